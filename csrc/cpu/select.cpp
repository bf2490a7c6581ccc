// Op tables of this binary, and a test of which of them this machine can run. Compiled for the baseline only.
#include "cpu/op_table.h"

#if defined(PYCIRCUIT_HAS_BF16)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pycircuit {

extern const OpTable op_table_baseline;
#ifdef PYCIRCUIT_HAS_V3
extern const OpTable op_table_v3;
#endif
#ifdef PYCIRCUIT_HAS_V4
extern const OpTable op_table_v4;
#endif
#ifdef PYCIRCUIT_HAS_BF16
extern const OpTable op_table_bf16;
#endif
#ifdef PYCIRCUIT_HAS_AMX
extern const OpTable op_table_amx;
#endif

namespace {

bool always() { return true; }

#if defined(PYCIRCUIT_HAS_V3)
bool machine_has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
#endif

#if defined(PYCIRCUIT_HAS_V4)
bool machine_has_v4() {
  return machine_has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(PYCIRCUIT_HAS_BF16)
struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// Leaf 7 of CPUID, zeros where there is none.
Registers features(unsigned subleaf) {
  Registers r;
  return __get_cpuid_count(7, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) ? r : Registers{};
}

bool machine_has_bf16() {
  static const bool usable = machine_has_v4() && (features(1).eax >> 5 & 1);
  return usable;
}
#endif

#if defined(PYCIRCUIT_HAS_AMX)
// Linux gives a process the state of tiles when it asks for it.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

bool machine_has_amx() {
  static const bool usable =
      machine_has_bf16() && (features(0).edx >> 22 & 1) && (features(0).edx >> 24 & 1) && may_use_tiles();
  return usable;
}
#endif

struct Candidate {
  const OpTable* table;
  bool (*supported)();
};

constexpr Candidate kCandidates[] = {
    {&op_table_baseline, always},
#ifdef PYCIRCUIT_HAS_V3
    {&op_table_v3, machine_has_v3},
#endif
#ifdef PYCIRCUIT_HAS_V4
    {&op_table_v4, machine_has_v4},
#endif
#ifdef PYCIRCUIT_HAS_BF16
    {&op_table_bf16, machine_has_bf16},
#endif
#ifdef PYCIRCUIT_HAS_AMX
    {&op_table_amx, machine_has_amx},
#endif
};

}  // namespace

int isa_count() { return sizeof kCandidates / sizeof *kCandidates; }

IsaEntry isa_entry(int i) { return {kCandidates[i].table, kCandidates[i].supported()}; }

}  // namespace pycircuit
