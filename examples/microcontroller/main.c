/* Classifies the images of a file with an exported network: on a microcontroller, and on a PC.

   usage: net IMAGES    a file of images of uint8 [channels][rows][columns], one after the other
   prints for each image the name of its class, its scores and the instructions that it took

   On a microcontroller, files are those of the computer that it is attached to, by semihosting. A product would take
   the image from a camera, and need neither files nor printf. */
#include <inttypes.h>
#include <stdio.h>

#include "net.h"

static uint8_t image[NET_IMAGE_BYTES];
static int32_t scores[NET_CLASSES];
static const char *const labels[] = NET_LABELS;

#ifdef __arm__
/* Timer 0 of the MPS2 boards counts down at 25 MHz. With -icount shift=0, an instruction takes a nanosecond in QEMU. */
static volatile uint32_t *const timer = (volatile uint32_t *)0x40000000;
#define INSTRUCTIONS_PER_TICK 40

static void start_timer(void)
{
    timer[2] = UINT32_MAX; /* where it starts again */
    timer[1] = UINT32_MAX; /* its value */
    timer[0] = 1;
}

static uint32_t ticks(void)
{
    return UINT32_MAX - timer[1];
}
#else
#define INSTRUCTIONS_PER_TICK 0

static void start_timer(void) {}

static uint32_t ticks(void)
{
    return 0;
}
#endif

int main(int argc, char **argv)
{
    FILE *const file = fopen(argc > 1 ? argv[1] : "images.bin", "rb");
    if (file == NULL) {
        printf("error: the file of images cannot be opened\n");
        return 1;
    }
    start_timer();
    while (fread(image, sizeof image, 1, file) == 1) {
        const uint32_t before = ticks();
        net_run(image, scores);
        const uint32_t taken = ticks() - before;
        int32_t best = 0;
        for (int32_t i = 1; i < NET_CLASSES; i++) {
            best = scores[i] > scores[best] ? i : best;
        }
        printf("%s:", labels[best]);
        for (int32_t i = 0; i < NET_CLASSES; i++) {
            printf(" %" PRId32, scores[i]);
        }
        printf("; %" PRIu32 " instructions\n", taken * INSTRUCTIONS_PER_TICK);
    }
    fclose(file);
    return 0;
}
