/* A few buffers, each taken by one run at a time: an exchange of pointers, so threads need no lock. */
#include "scratch.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#define SLOTS 4                  /* sessions that run at once and find memory */
#define KEPT (4 * 1024 * 1024)   /* larger ones are given back to the system */
#define ALIGNMENT 64

typedef struct {
  void *raw;
  size_t size;
} head; /* before the memory that is handed out */

static _Atomic(void *) slots[SLOTS];
static atomic_int kernels;

static head *head_of(void *memory) { return (head *)(void *)((uint8_t *)memory - ALIGNMENT); }

static void release(void *memory) {
  if (memory) free(head_of(memory)->raw);
}

void flrc_scratch_join(void) { atomic_fetch_add(&kernels, 1); }

void flrc_scratch_leave(void) {
  if (atomic_fetch_sub(&kernels, 1) == 1)
    for (int i = 0; i < SLOTS; i++) release(atomic_exchange(slots + i, NULL));
}

void *flrc_scratch_take(size_t size) {
  for (int i = 0; i < SLOTS; i++) {
    void *kept = atomic_exchange(slots + i, NULL);
    if (kept && head_of(kept)->size >= size) return kept;
    release(kept);
  }
  if (size > SIZE_MAX - 3 * ALIGNMENT) return NULL;
  size = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  uint8_t *raw = malloc(size + 2 * ALIGNMENT);
  if (!raw) return NULL;
  void *memory = raw + 2 * ALIGNMENT - (uintptr_t)raw % ALIGNMENT;
  head_of(memory)->raw = raw;
  head_of(memory)->size = size;
  return memory;
}

void flrc_scratch_give(void *memory) {
  if (memory && head_of(memory)->size <= KEPT)
    for (int i = 0; memory && i < SLOTS; i++) memory = atomic_exchange(slots + i, memory);
  release(memory);
}
