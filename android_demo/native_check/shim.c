/* What Android's C library has and glibc has not, as far as Android's onnxruntime asks for it on aarch64.
 *
 * Built as libc.so; libm.so, libdl.so, liblog.so and libandroid.so are empty beside it. Only for the check under qemu: none
 * of it is in the APK. Sizes of types differ between the two libraries, and that is most of what is bridged here. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* The first thread-local block of the process: bionic's stack guard, at TP + 0x28, must not change under it. */
__thread char tls_guard[256] __attribute__((aligned(64))) = {1};

int *__errno(void) { return &errno; }
char *__gnu_strerror_r(int error, char *text, size_t size) { return strerror_r(error, text, size); }
size_t __strlen_chk(const char *text, size_t size) { (void)size; return strlen(text); }
char *__strchr_chk(const char *text, int c, size_t size) { (void)size; return strchr(text, c); }
void __FD_SET_chk(int file, void *set, size_t size) { (void)size; ((unsigned long *)set)[file / 64] |= 1UL << (file % 64); }
int __FD_ISSET_chk(int file, void *set, size_t size) { (void)size; return ((unsigned long *)set)[file / 64] >> (file % 64) & 1; }
void __gcov_dump(void) {}
void __gcov_flush(void) {}

int __system_property_get(const char *key, char *value) {
  strcpy(value, strcmp(key, "ro.build.version.sdk") ? "" : "33");
  return (int)strlen(value);
}

int __android_log_vprint(int level, const char *tag, const char *format, va_list list) {
  dprintf(2, "[%d %s] ", level, tag);
  vdprintf(2, format, list);
  return dprintf(2, "\n");
}

int __android_log_print(int level, const char *tag, const char *format, ...) {
  va_list list;
  va_start(list, format);
  int done = __android_log_vprint(level, tag, format, list);
  va_end(list);
  return done;
}

int __android_log_write(int level, const char *tag, const char *text) { return dprintf(2, "[%d %s] %s\n", level, tag, text); }
void android_set_abort_message(const char *text) { dprintf(2, "abort: %s\n", text); }

/* Bionic's dirname leaves its argument alone. */
char *dirname(char *path) {
  static __thread char found[4096];
  strncpy(found, path ? path : "", sizeof found - 1);
  size_t length = strlen(found);
  while (length > 1 && found[length - 1] == '/') found[--length] = 0;
  char *slash = strrchr(found, '/');
  if (!slash) strcpy(found, ".");
  else if (slash == found) found[1] = 0;
  else *slash = 0;
  return found;
}

/* stdin, stdout and stderr are three FILEs of 152 bytes there. */
char __sF[3][152];

static FILE *file_of(void *file) {
  char *place = file;
  if (place < __sF[0] || place >= __sF[0] + sizeof __sF) return file;
  return place < __sF[1] ? stdin : place < __sF[2] ? stdout : stderr;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int vfprintf(FILE *file, const char *format, va_list list) { return NEXT(vfprintf)(file_of(file), format, list); }
int fputs(const char *text, FILE *file) { return NEXT(fputs)(text, file_of(file)); }
int fputc(int c, FILE *file) { return NEXT(fputc)(c, file_of(file)); }
size_t fwrite(const void *data, size_t size, size_t count, FILE *file) { return NEXT(fwrite)(data, size, count, file_of(file)); }
int fflush(FILE *file) { return NEXT(fflush)(file ? file_of(file) : NULL); }

int fprintf(FILE *file, const char *format, ...) {
  va_list list;
  va_start(list, format);
  int done = vfprintf(file, format, list);
  va_end(list);
  return done;
}

/* Names of values have other numbers there: without the size of a page onnxruntime could not map a file of weights. */
long sysconf(int name) {
  switch (name) {
  case 39: case 40: return NEXT(sysconf)(_SC_PAGESIZE);
  case 96: return NEXT(sysconf)(_SC_NPROCESSORS_CONF);
  case 97: return NEXT(sysconf)(_SC_NPROCESSORS_ONLN);
  case 98: return NEXT(sysconf)(_SC_PHYS_PAGES);
  case 99: return NEXT(sysconf)(_SC_AVPHYS_PAGES);
  default: return -1;
  }
}

/* pthread_attr_t has 56 bytes there (64 here), pthread_mutex_t 40 (48). */
int pthread_attr_init(pthread_attr_t *attributes) {
  memset(attributes, 0, 56);
  return 0;
}

int pthread_attr_setstacksize(pthread_attr_t *attributes, size_t size) {
  ((size_t *)attributes)[1] = size;
  return 0;
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*body)(void *), void *argument) {
  pthread_attr_t own;
  NEXT(pthread_attr_init)(&own);
  if (attributes && ((const size_t *)attributes)[1]) NEXT(pthread_attr_setstacksize)(&own, ((const size_t *)attributes)[1]);
  return NEXT(pthread_create)(thread, &own, body, argument);
}

int pthread_mutex_init(pthread_mutex_t *mutex, const pthread_mutexattr_t *attributes) {
  pthread_mutex_t own;
  int error = NEXT(pthread_mutex_init)(&own, attributes);
  memcpy(mutex, &own, 40);
  return error;
}

/* pthread_cond_t is aligned to 4 bytes there and 8 here: a futex that counts signals instead. */
static uint32_t *count_of(pthread_cond_t *condition) { return (uint32_t *)condition; }

static int woken(pthread_cond_t *condition, int threads) {
  __atomic_add_fetch(count_of(condition), 1, __ATOMIC_SEQ_CST);
  syscall(SYS_futex, count_of(condition), FUTEX_WAKE_PRIVATE, threads, NULL, NULL, 0);
  return 0;
}

static int waited(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
  uint32_t seen = __atomic_load_n(count_of(condition), __ATOMIC_SEQ_CST);
  pthread_mutex_unlock(mutex);
  int kind = FUTEX_WAIT_BITSET_PRIVATE | FUTEX_CLOCK_REALTIME;
  long done = syscall(SYS_futex, count_of(condition), kind, seen, until, NULL, FUTEX_BITSET_MATCH_ANY);
  int error = done < 0 ? errno : 0;
  pthread_mutex_lock(mutex);
  return error == ETIMEDOUT ? ETIMEDOUT : 0;
}

int pthread_cond_init(pthread_cond_t *condition, const pthread_condattr_t *attributes) {
  (void)attributes;
  *count_of(condition) = 0;
  return 0;
}

int pthread_cond_destroy(pthread_cond_t *condition) { (void)condition; return 0; }
int pthread_cond_signal(pthread_cond_t *condition) { return woken(condition, 1); }
int pthread_cond_broadcast(pthread_cond_t *condition) { return woken(condition, 0x7fffffff); }
int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex) { return waited(condition, mutex, NULL); }

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
  return waited(condition, mutex, until);
}
