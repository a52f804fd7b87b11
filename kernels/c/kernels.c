/* All native kernels, once for float32 and once for bfloat16. */
#define _GNU_SOURCE
#include "pool.h"
#include "vector.h"

#include "digest.h"
#include "fp8.h"

/* Below this many elements, waking threads costs more than they save. */
#define ENOUGH_FOR_THREADS 16384
#define PARTS_FOR(elements) ((elements) < ENOUGH_FOR_THREADS ? 0 : 4)

int vector_length(void) { return VL; }

#include "choice.h"
#include "grouped.h"

#define ELEM float
#define WEIGHT bf16
#define WEIGHT_IS_BF16
#define NAME(x) x##_f32_by_bf16
#define store_f32_by_bf16 store_f32
#define load_f32_by_bf16 load_f32
#define put_f32_by_bf16 put_f32
#define get_f32_by_bf16 get_f32
#include "linear.h"
#include "mixture.h"
#undef WEIGHT
#undef WEIGHT_IS_BF16
#undef NAME

#define WEIGHT float
#define NAME(x) x##_f32
#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "grouped_rows.h"
#include "lora.h"
#include "quantize.h"
#include "layers.h"
#include "mixture.h"
#undef ELEM
#undef WEIGHT
#undef NAME

#define ELEM bf16
#define ELEM_IS_BF16
#define WEIGHT bf16
#define WEIGHT_IS_BF16
#define NAME(x) x##_bf16
#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "grouped_rows.h"
#include "lora.h"
#include "quantize.h"
#include "layers.h"
#include "mixture.h"

const int64_t sizeof_query_tile = sizeof(query_tile), sizeof_window_plan = sizeof(window_plan), sizeof_matrix = sizeof(matrix),
              sizeof_decoder_layer = sizeof(decoder_layer), sizeof_stack_step = sizeof(stack_step), sizeof_expert = sizeof(expert),
              sizeof_mixture = sizeof(mixture), sizeof_update_part = sizeof(update_part), sizeof_update_site = sizeof(update_site),
              sizeof_update_segment = sizeof(update_segment), sizeof_update_block = sizeof(update_block);
