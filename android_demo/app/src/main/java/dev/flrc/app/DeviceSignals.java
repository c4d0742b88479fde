package dev.flrc.app;

import android.content.Context;
import android.content.Intent;
import android.content.IntentFilter;
import android.os.BatteryManager;
import android.os.Build;
import android.os.Debug;
import android.os.PowerManager;
import dev.flrc.engine.JsonText;
import java.lang.reflect.InvocationTargetException;
import java.util.LinkedHashMap;
import java.util.Map;

/** What the device says of itself, as plain numbers: the page and the engine's policies take them. */
final class DeviceSignals {
    private static final int THERMAL_API = 29;

    private final Context context;

    DeviceSignals(Context context) {
        this.context = context;
    }

    /**
     * An event {@code device}: {@code memory_bytes} (proportional set size), {@code battery} (share of its charge, null
     * where there is none), {@code charging}, {@code thermal} (0 none to 6 shutdown, null below Android 10).
     */
    String event() {
        Map<String, Object> event = new LinkedHashMap<>();
        event.put("type", "device");
        event.put("memory_bytes", 1024L * Debug.getPss());
        Intent battery = context.registerReceiver(null, new IntentFilter(Intent.ACTION_BATTERY_CHANGED));
        int level = battery == null ? -1 : battery.getIntExtra(BatteryManager.EXTRA_LEVEL, -1);
        int scale = battery == null ? -1 : battery.getIntExtra(BatteryManager.EXTRA_SCALE, -1);
        event.put("battery", level < 0 || scale <= 0 ? null : (double) level / scale);
        event.put("charging", battery != null && battery.getIntExtra(BatteryManager.EXTRA_PLUGGED, 0) != 0);
        event.put("thermal", thermal());
        return JsonText.of(event);
    }

    /** The thermal status, by reflection: the APK is built against an older platform than it runs on. */
    private Integer thermal() {
        if (Build.VERSION.SDK_INT < THERMAL_API) {
            return null;
        }
        try {
            Object power = context.getSystemService(Context.POWER_SERVICE);
            return (Integer) PowerManager.class.getMethod("getCurrentThermalStatus").invoke(power);
        } catch (NoSuchMethodException | IllegalAccessException | InvocationTargetException e) {
            return null;
        }
    }
}
