plugins {
    id("com.android.application")
}

android {
    namespace = "dev.flrc.app"
    compileSdk = 35

    defaultConfig {
        applicationId = "dev.flrc.app"
        minSdk = 26
        targetSdk = 35
        versionCode = 1
        versionName = "0.1"
        ndk { abiFilters += "arm64-v8a" }
        testInstrumentationRunner = "androidx.test.runner.AndroidJUnitRunner"
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_11
        targetCompatibility = JavaVersion.VERSION_11
    }

    // The engine is plain Java; its tests run on a desktop JVM (make android-test).
    sourceSets["main"].java.srcDir("../engine/src/main/java")

    packaging { jniLibs { useLegacyPackaging = true } }
}

dependencies {
    implementation("com.microsoft.onnxruntime:onnxruntime-android:1.29.0")
    androidTestImplementation("androidx.test.ext:junit:1.2.1")
    androidTestImplementation("androidx.test:core:1.6.1")
    androidTestImplementation("androidx.test:runner:1.6.2")
}
