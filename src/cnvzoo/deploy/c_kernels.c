/* section: structs */
/* From sums of products to levels, for each channel. Layers of few levels have thresholds: the level is how many of them
   the sum reaches. Others have (sum * multiplier + offset) >> shift, limited to 0..most, and changes where that puts the
   beginning of a level at another sum than the rounding of the integer graph in float32 does. */
struct steps {
    int32_t most; /* the largest level */
    const int32_t *thresholds; /* [most][channels] */
    const int32_t *multiplier;
    const int64_t *offset;
    const uint8_t *shift;
    const int32_t *changes; /* channel, sum at which the level begins, sum at which it would without the change */
    int32_t change_count;
};

struct layer {
    const uint8_t *weights; /* packed rows */
    int32_t bits, row_bytes, row_weights;
    int32_t row;   /* row_weights, with zeros up to a multiple of 16 */
    int32_t block; /* rows that are unpacked at a time, and in depthwise layers the channels of a row */
    int32_t in_rows, in_columns, in_channels;
    int32_t in_kept; /* rows of the input that are in memory: row y at y % in_kept */
    int32_t kernel_rows, kernel_columns, stride_rows, stride_columns, pad_rows, pad_columns, groups;
    int32_t out_columns, out_channels, out_kept;
    int32_t pool; /* 2: the largest of 2x2; 1: no pooling */
    struct steps steps;
};

static int32_t smaller(int32_t a, int32_t b)
{
    return a < b ? a : b;
}

/* section: larger */
static int32_t larger(int32_t a, int32_t b)
{
    return a > b ? a : b;
}

/* section: unpack_ternary */
/* Five weights of -1, 0 and 1 in a byte, as the first digits of byte / 256 in base 3. Those of byte i are the weights
   i, i + bytes, i + 2 * bytes and so on, so that compilers vectorise the loop. */
static void unpack_ternary(const uint8_t *restrict packed, int32_t bytes, int8_t *restrict row)
{
    int32_t power = 1;
    for (int32_t digit = 0; digit < 5; digit++) {
        for (int32_t i = 0; i < bytes; i++) {
            const uint8_t rest = (uint8_t)(packed[i] * power);
            row[i] = (int8_t)(((rest * 3) >> 8) - 1);
        }
        row += bytes;
        power *= 3;
    }
}

/* section: unpack_bits */
/* Weights of 1 bit are -1 or 1; those of more are stored above their smallest value, 3, 5, 6 and 7 bits in parts of 4,
   2 and 1. What is in byte i belongs to the weights i, i + bytes and so on, so that compilers vectorise the loops. */
static void unpack_bits(const uint8_t *restrict packed, int32_t bits, int32_t weights, int8_t *restrict row)
{
    const int32_t step = bits == 1 ? 2 : 1, least = bits == 1 ? 1 : (1 << (bits - 1)) - 1;
    int32_t up = 0;
    for (int32_t part = 4; part > 0; part /= 2) {
        if ((bits & part) == 0) {
            continue;
        }
        const int32_t in_byte = 8 / part, bytes = (weights + in_byte - 1) / in_byte, mask = (1 << part) - 1;
        for (int32_t k = 0; k < in_byte; k++) {
            int8_t *const to = row + k * bytes;
            for (int32_t i = 0; i < bytes; i++) {
                const int32_t value = (packed[i] >> (k * part)) & mask;
                to[i] = (int8_t)(up == 0 ? value : to[i] | (value << up));
            }
        }
        packed += bytes;
        up += part;
    }
    for (int32_t i = 0; i < weights; i++) {
        row[i] = (int8_t)(row[i] * step - least);
    }
}

/* section: unpack_row */
static void unpack_row(const struct layer *layer, int32_t index, int8_t *restrict row)
{
    const uint8_t *const packed = layer->weights + index * layer->row_bytes;
    /* if bits8 */
    if (layer->bits == 8) {
        for (int32_t i = 0; i < layer->row_weights; i++) {
            row[i] = (int8_t)packed[i];
        }
    }
    /* if bits2 */
    if (layer->bits == 2) {
        unpack_ternary(packed, layer->row_bytes, row);
    }
    /* if bits_other */
    if (layer->bits != 2 && layer->bits != 8) {
        unpack_bits(packed, layer->bits, layer->row_weights, row);
    }
    /* end */
    for (int32_t i = layer->row_weights; i < layer->row; i++) {
        row[i] = 0;
    }
}

/* section: to_levels */
/* The levels of `count` channels from `channel` on. */
static void to_levels(const struct layer *layer, int32_t channel, int32_t count, const int32_t *restrict sums,
                      uint8_t *restrict levels)
{
    const struct steps *const steps = &layer->steps;
    /* if thresholds */
    if (steps->thresholds) {
        for (int32_t i = 0; i < count; i++) {
            levels[i] = 0;
        }
        for (int32_t k = 0; k < steps->most; k++) {
            const int32_t *const thresholds = steps->thresholds + k * layer->out_channels + channel;
            for (int32_t i = 0; i < count; i++) {
                levels[i] = (uint8_t)(levels[i] + (sums[i] >= thresholds[i]));
            }
        }
        return;
    }
    /* if multipliers */
    const int32_t *const multiplier = steps->multiplier + channel;
    const int64_t *const offset = steps->offset + channel;
    const uint8_t *const shift = steps->shift + channel;
    for (int32_t i = 0; i < count; i++) {
        const int64_t scaled = (int64_t)sums[i] * multiplier[i] + offset[i];
        const int64_t level = (int64_t)((uint64_t)(scaled < 0 ? 0 : scaled) >> shift[i]);
        levels[i] = (uint8_t)(level > steps->most ? steps->most : level);
    }
    /* if changes */
    if (!steps->changes) {
        return;
    }
    const int32_t *change = steps->changes, *const end = change + 3 * steps->change_count;
    while (change < end && change[0] < channel) {
        change += 3;
    }
    for (; change < end && change[0] < channel + count; change += 3) {
        const int32_t i = change[0] - channel;
        levels[i] = (uint8_t)(levels[i] + (sums[i] >= change[1]) - (sums[i] >= change[2]));
    }
    /* end */
}

/* section: dot */
/* Sums of products of n levels and four rows of weights. */
static void dot4(const uint8_t *restrict x, const int8_t *restrict w, int32_t n, int32_t *restrict sums)
{
    const int8_t *const w1 = w + n, *const w2 = w1 + n, *const w3 = w2 + n;
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (int32_t i = 0; i < n; i++) {
        s0 += x[i] * w[i];
        s1 += x[i] * w1[i];
        s2 += x[i] * w2[i];
        s3 += x[i] * w3[i];
    }
    sums[0] = s0;
    sums[1] = s1;
    sums[2] = s2;
    sums[3] = s3;
}

/* section: convolve */
/* The levels of one group of channels under the kernel at an output position, with zeros outside of the input. */
static const uint8_t *window_at(const struct layer *layer, const uint8_t *in, int32_t group, int32_t y, int32_t x)
{
    const int32_t channels = layer->in_channels / layer->groups;
    const int32_t top = y * layer->stride_rows - layer->pad_rows;
    const int32_t left = x * layer->stride_columns - layer->pad_columns;
    if (layer->kernel_rows == 1 && layer->kernel_columns == 1 && layer->row == layer->in_channels
        && layer->row == layer->row_weights && top >= 0
        && left >= 0 && top < layer->in_rows && left < layer->in_columns) {
        return in + (top % layer->in_kept * layer->in_columns + left) * channels;
    }
    uint8_t *to = window;
    const int32_t is_whole = layer->groups == 1 && left >= 0 && left + layer->kernel_columns <= layer->in_columns;
    for (int32_t row = top; row < top + layer->kernel_rows; row++) {
        const int32_t is_inside = row >= 0 && row < layer->in_rows;
        const uint8_t *const from = in + (is_inside ? row % layer->in_kept : 0) * layer->in_columns * layer->in_channels;
        if (is_inside && is_whole) {
            const uint8_t *const part = from + left * channels;
            for (int32_t i = 0; i < layer->kernel_columns * channels; i++) {
                to[i] = part[i];
            }
            to += layer->kernel_columns * channels;
            continue;
        }
        for (int32_t column = left; column < left + layer->kernel_columns; column++) {
            if (is_inside && column >= 0 && column < layer->in_columns) {
                const uint8_t *const part = from + column * layer->in_channels + group * channels;
                for (int32_t i = 0; i < channels; i++) {
                    to[i] = part[i];
                }
            } else {
                for (int32_t i = 0; i < channels; i++) {
                    to[i] = 0;
                }
            }
            to += channels;
        }
    }
    return window;
}

/* The rows `first` to `last` - 1 of the output of a layer. */
static void convolve(const struct layer *layer, const uint8_t *in, uint8_t *out, int32_t first, int32_t last)
{
    const int32_t in_group = layer->out_channels / layer->groups;
    for (int32_t channel = 0; channel < layer->out_channels;) {
        const int32_t group = channel / in_group;
        const int32_t count = smaller(layer->block, (group + 1) * in_group - channel);
        for (int32_t i = 0; i < count; i++) {
            unpack_row(layer, channel + i, rows + i * layer->row);
        }
        for (int32_t y = first; y < last; y++) {
            uint8_t *to = out + y % layer->out_kept * layer->out_columns * layer->out_channels + channel;
            for (int32_t x = 0; x < layer->out_columns; x++, to += layer->out_channels) {
                int32_t largest[BLOCK], sums[BLOCK];
                for (int32_t corner = 0; corner < layer->pool * layer->pool; corner++) {
                    const uint8_t *const levels =
                        window_at(layer, in, group, y * layer->pool + corner / 2, x * layer->pool + corner % 2);
                    int32_t *const found = corner == 0 ? largest : sums;
                    for (int32_t i = 0; i < count; i += 4) {
                        dot4(levels, rows + i * layer->row, layer->row, found + i);
                    }
                    for (int32_t i = 0; corner > 0 && i < count; i++) {
                        largest[i] = sums[i] > largest[i] ? sums[i] : largest[i];
                    }
                }
                to_levels(layer, channel, count, largest, to);
            }
        }
        channel += count;
    }
}

/* section: depthwise */
/* As `convolve`, of layers in which each channel has its own kernel: a row holds the kernels of `block` channels. */
static void convolve_depthwise(const struct layer *layer, const uint8_t *in, uint8_t *out, int32_t first, int32_t last)
{
    const int32_t channels = layer->in_channels;
    for (int32_t channel = 0; channel < channels; channel += layer->block) {
        const int32_t count = smaller(layer->block, channels - channel);
        unpack_row(layer, channel / layer->block, rows);
        for (int32_t y = first; y < last; y++) {
            uint8_t *to = out + y % layer->out_kept * layer->out_columns * channels + channel;
            for (int32_t x = 0; x < layer->out_columns; x++, to += channels) {
                int32_t largest[BLOCK], sums[BLOCK];
                for (int32_t corner = 0; corner < layer->pool * layer->pool; corner++) {
                    const int32_t top = (y * layer->pool + corner / 2) * layer->stride_rows - layer->pad_rows;
                    const int32_t left = (x * layer->pool + corner % 2) * layer->stride_columns - layer->pad_columns;
                    const int8_t *kernel = rows;
                    for (int32_t i = 0; i < count; i++) {
                        sums[i] = 0;
                    }
                    for (int32_t row = top; row < top + layer->kernel_rows; row++) {
                        for (int32_t column = left; column < left + layer->kernel_columns; column++) {
                            if (row >= 0 && row < layer->in_rows && column >= 0 && column < layer->in_columns) {
                                const uint8_t *const part =
                                    in + (row % layer->in_kept * layer->in_columns + column) * channels + channel;
                                for (int32_t i = 0; i < count; i++) {
                                    sums[i] += part[i] * kernel[i];
                                }
                            }
                            kernel += layer->block;
                        }
                    }
                    for (int32_t i = 0; i < count; i++) {
                        largest[i] = corner == 0 || sums[i] > largest[i] ? sums[i] : largest[i];
                    }
                }
                to_levels(layer, channel, count, largest, to);
            }
        }
    }
}

/* section: interleave */
/* An image [channels][pixels] as [pixels][channels], the order of all levels. */
static void interleave(const uint8_t *image, int32_t channels, int32_t pixels, uint8_t *out)
{
    for (int32_t channel = 0; channel < channels; channel++) {
        for (int32_t i = 0; i < pixels; i++) {
            out[i * channels + channel] = image[channel * pixels + i];
        }
    }
}

/* section: round_levels */
/* Levels rounded to fewer bits or another scale. */
static void round_levels(const uint8_t *table, const uint8_t *in, uint8_t *out, int32_t count)
{
    for (int32_t i = 0; i < count; i++) {
        out[i] = table[in[i]];
    }
}

/* section: add */
/* The sum of two inputs of which one or both are stored above -128, so that `above` is 128 or 256; from 0 to 255. */
static void add(const uint8_t *first, const uint8_t *second, int32_t above, uint8_t *out, int32_t count)
{
    for (int32_t i = 0; i < count; i++) {
        const int32_t sum = first[i] + second[i] - above;
        out[i] = (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
    }
}

/* section: score */
/* The scores: sums over all pixels of products of levels and weights, times the gain, plus the bias. */
static void score(const struct layer *layer, const uint8_t *in, int32_t pixels, int32_t gain, const int32_t *bias,
                  int32_t *scores)
{
    for (int32_t class = 0; class < layer->out_channels; class += layer->block) {
        const int32_t count = smaller(layer->block, layer->out_channels - class);
        int32_t sums[BLOCK];
        for (int32_t i = 0; i < count; i++) {
            unpack_row(layer, class + i, rows + i * layer->row);
            scores[class + i] = 0;
        }
        for (int32_t pixel = 0; pixel < pixels; pixel++) {
            const uint8_t *const part = in + pixel * layer->row_weights;
            for (int32_t i = 0; i < layer->row; i++) {
                window[i] = i < layer->row_weights ? part[i] : 0;
            }
            for (int32_t i = 0; i < count; i += 4) {
                dot4(window, rows + i * layer->row, layer->row, sums + i);
            }
            for (int32_t i = 0; i < count; i++) {
                scores[class + i] += sums[i];
            }
        }
        for (int32_t i = 0; i < count; i++) {
            scores[class + i] = scores[class + i] * gain + (bias ? bias[class + i] : 0);
        }
    }
}
