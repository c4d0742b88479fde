/* What the kernels use of Android's C library, declared here because its headers come with the NDK only.
 *
 * build.py makes an empty libc.so of these names to link against; on a phone they are bionic's. Mathematics are
 * instructions, so libm is not needed.
 */
#ifndef FLRC_ANDROID_LIBC_H
#define FLRC_ANDROID_LIBC_H

#include <stddef.h>

void *malloc(size_t size);
void *calloc(size_t count, size_t size);
void *realloc(void *memory, size_t size);
int posix_memalign(void **memory, size_t alignment, size_t size);
void free(void *memory);
char *getenv(const char *name);
void *memcpy(void *to, const void *from, size_t size);
void *memmove(void *to, const void *from, size_t size);
void *memset(void *memory, int byte, size_t size);
int memcmp(const void *one, const void *other, size_t size);
int strcmp(const char *one, const char *other);
int strncmp(const char *one, const char *other, size_t size);
size_t strlen(const char *text);
int snprintf(char *text, size_t size, const char *format, ...);
unsigned long getauxval(unsigned long type);

#define fmaf __builtin_fmaf
#define sqrtf __builtin_sqrtf
#define fabsf __builtin_fabsf
#define rintf __builtin_rintf
#define isfinite __builtin_isfinite
#define isnan __builtin_isnan
#define isinf __builtin_isinf
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")

#endif
