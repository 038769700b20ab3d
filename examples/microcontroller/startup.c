/* What a Cortex-M reads when it starts: the address of the stack, and that of the first function, newlib's _start, which
   calls main. */
#include <stdint.h>

extern uint32_t stack_top; /* of link.ld */
void _start(void);

static void stop(void)
{
    for (;;) {
    }
}

__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    &stack_top, (const void *)_start, (const void *)stop, (const void *)stop,
};
