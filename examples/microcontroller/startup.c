/* What a Cortex-M does first: the stack and the entry, which newlib's _start is. */
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
