/* Memory that runs of operators take and give back, so that it is not fetched from the system at every node. */
#ifndef FLRC_SCRATCH_H
#define FLRC_SCRATCH_H

#include <stddef.h>

/* Counts the kernels there are: the last one that goes frees what is kept. */
void flrc_scratch_join(void);
void flrc_scratch_leave(void);

/* At least so many bytes at a multiple of 64 bytes, of any content; NULL if there are none. */
void *flrc_scratch_take(size_t size);
void flrc_scratch_give(void *memory);

#endif
