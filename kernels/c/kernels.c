/* All native kernels, once for float32 and once for bfloat16. */
#define _GNU_SOURCE
#include "pool.h"
#include "vector.h"

/* Below this many elements, waking threads costs more than they save. */
#define ENOUGH_FOR_THREADS 16384
#define PARTS_FOR(elements) ((elements) < ENOUGH_FOR_THREADS ? 0 : 4)

int vector_length(void) { return VL; }

#define ELEM float
#define NAME(x) x##_f32
#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#undef ELEM
#undef NAME

#define ELEM bf16
#define ELEM_IS_BF16
#define NAME(x) x##_bf16
#include "attention.h"
#include "elementwise.h"
#include "linear.h"
