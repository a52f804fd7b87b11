/* KV blocks as bytes: their digests (kernels/blocks/digest.py says what these are), and moving them between a pool and packed memory.
   A pool has, for each layer and block, two sides (keys, values) of planes, one for each head; strides are in bytes. */
#pragma once

typedef uint64_t v64 __attribute__((vector_size(64)));

INLINE v64 load_words(const char *p) {
    v64 x;
    memcpy(&x, p, sizeof x);
    return x;
}
#define FOLDED(x) ((x) ^ ((x) >> 33))

/* The sum of folded word times constant over a plane's first num_bytes, as if zeros followed. */
static uint64_t digest_plane(const char *plane, long num_bytes, const char *constants) {
    v64 a = {0}, b = {0};
    uint64_t sum = 0, x, c;
    long at = 0;
    for (; at + 128 <= num_bytes; at += 128) {
        v64 y = load_words(plane + at), z = load_words(plane + at + 64);
        a += FOLDED(y) * load_words(constants + at);
        b += FOLDED(z) * load_words(constants + at + 64);
    }
    for (; at < num_bytes; at += 8) {
        x = 0;
        memcpy(&x, plane + at, num_bytes - at < 8 ? num_bytes - at : 8);
        memcpy(&c, constants + at, 8);
        sum += FOLDED(x) * c;
    }
    a += b;
    for (int i = 0; i < 8; i++) sum += a[i];
    return sum;
}

/* out [blocks, layers, heads]; of each plane of block i the first num_bytes[i] count; constants [2, side_constants bytes]. */
void digest_blocks(const char *pool, const long *blocks, const long *num_bytes, long num_blocks, long num_layers, long num_heads,
                   long layer_stride, long block_stride, long side_stride, long head_stride, const char *constants, long side_constants,
                   uint64_t *out) {
    for (long i = 0; i < num_blocks; i++)
        for (long l = 0; l < num_layers; l++)
            for (long k = 0; k < num_heads; k++) {
                const char *keys = pool + l * layer_stride + blocks[i] * block_stride + k * head_stride;
                *out++ = digest_plane(keys, num_bytes[i], constants) +
                         digest_plane(keys + side_stride, num_bytes[i], constants + side_constants);
            }
}

/* packed [blocks, layers, 2, run_bytes]: a run is the planes of a range of heads, from the pool's first. */
void move_blocks(char *pool, const long *blocks, long num_blocks, long num_layers, long run_bytes, long layer_stride,
                 long block_stride, long side_stride, char *packed, int is_unpacking) {
    long num_sides = side_stride == run_bytes ? 1 : 2, run = run_bytes * 2 / num_sides;
    for (long i = 0; i < num_blocks; i++)
        for (long l = 0; l < num_layers; l++)
            for (long side = 0; side < num_sides; side++, packed += run) {
                char *place = pool + l * layer_stride + blocks[i] * block_stride + side * side_stride;
                if (is_unpacking)
                    memcpy(place, packed, run);
                else
                    memcpy(packed, place, run);
            }
}

/* Unpacks blocks layer by layer, each layer once its digests equal the expected ones [blocks, layers, heads]; a block ends at its first
   layer whose digests differ. is_right [blocks] says which were unpacked whole. */
void unpack_verified_blocks(char *pool, const long *blocks, const long *num_bytes, long num_blocks, long num_layers, long num_heads,
                           long plane_bytes, long layer_stride, long block_stride, long side_stride, const char *packed,
                           const char *constants, long side_constants, const uint64_t *expected, uint8_t *is_right) {
    long run = num_heads * plane_bytes;
    for (long i = 0; i < num_blocks; i++) {
        is_right[i] = 1;
        for (long l = 0; l < num_layers && is_right[i]; l++) {
            long at = i * num_layers + l;
            const char *keys = packed + at * 2 * run, *values = keys + run;
            for (long k = 0; k < num_heads; k++)
                if (digest_plane(keys + k * plane_bytes, num_bytes[i], constants) +
                        digest_plane(values + k * plane_bytes, num_bytes[i], constants + side_constants) !=
                    expected[at * num_heads + k])
                    is_right[i] = 0;
            if (is_right[i]) {
                char *place = pool + l * layer_stride + blocks[i] * block_stride;
                memcpy(place, keys, run);
                memcpy(place + side_stride, values, run);
            }
        }
    }
}
