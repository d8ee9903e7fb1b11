#include "processor.h"

#include "instructions.h"
#include "threads.h"

#include <stdatomic.h>
#include <stdint.h>

#if defined(X86)
#ifdef GNU
#include <cpuid.h>
#else
#include <intrin.h>
#endif

/* Four registers of flags. */
typedef struct {
    unsigned eax, ebx, ecx, edx;
} Flags;

static Flags flags_of(unsigned leaf, unsigned part)
{
    Flags flags = {0, 0, 0, 0};
#ifdef GNU
    __get_cpuid_count(leaf, part, &flags.eax, &flags.ebx, &flags.ecx, &flags.edx);
#else
    int own[4];
    __cpuid(own, 0);
    if ((unsigned)own[0] >= leaf) {
        __cpuidex(own, (int)leaf, (int)part);
        flags = (Flags){(unsigned)own[0], (unsigned)own[1], (unsigned)own[2], (unsigned)own[3]};
    }
#endif
    return flags;
}

/* Which registers the operating system keeps for each thread. */
static unsigned kept_registers(void)
{
#ifdef GNU
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
#else
    return (unsigned)_xgetbv(0);
#endif
}

#define HAS(flags, bit) ((flags) >> (bit) & 1u)

static int has_avx2(void)
{
    Flags basic = flags_of(1, 0);
    int fma = HAS(basic.ecx, 12), kept = HAS(basic.ecx, 27), avx = HAS(basic.ecx, 28);
    int f16c = HAS(basic.ecx, 29);
    return fma && kept && avx && f16c && HAS(flags_of(7, 0).ebx, 5) && (kept_registers() & 0x6) == 0x6;
}

static int has_avx512vnni(void)
{
    Flags more = flags_of(7, 0);
    int f = HAS(more.ebx, 16), dq = HAS(more.ebx, 17), bw = HAS(more.ebx, 30), vl = HAS(more.ebx, 31);
    return has_avx2() && f && dq && bw && vl && HAS(more.ecx, 11) && (kept_registers() & 0xe6) == 0xe6;
}

int has_bfloat16(void)
{
    static atomic_int known = -1; /* asking takes microseconds in a virtual machine */
    int has = atomic_load_explicit(&known, memory_order_relaxed);
    if (has < 0) {
        has = has_avx512vnni() && HAS(flags_of(7, 1).eax, 5);
        atomic_store_explicit(&known, has, memory_order_relaxed);
    }
    return has;
}

static int has(int number)
{
    switch (number) {
    case AVX2:
        return has_avx2();
    case AVXVNNI: /* which not all have that have AVX512-VNNI */
        return has_avx2() && HAS(flags_of(7, 1).eax, 4);
    case AVX512VNNI:
        return has_avx512vnni();
    default:
        return 0;
    }
}

#elif defined(ARM)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#include <windows.h>
#endif

static int has_dotprod(void)
{
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1; /* HWCAP_ASIMDDP */
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, NULL, 0) && has;
#elif defined(_WIN32)
    return IsProcessorFeaturePresent(43) != 0; /* PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE */
#else
    return 0;
#endif
}

int has_bfloat16(void) { return 0; }

static int has(int number) { return number == NEON || (number == DOTPROD && has_dotprod()); }

#else

int has_bfloat16(void) { return 0; }

/* The orders of weights are those of processors whose lowest byte is the first one. */
static int has(int number)
{
    const uint16_t one = 1;
    return number == PLAIN && *(const uint8_t *)&one;
}
#endif

/* Returns whether this processor has the instructions of the set with this number. */
EXPORT int has_instructions(int number) { return has(number); }
