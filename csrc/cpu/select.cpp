// Op tables of this binary, and a test of which of them this machine can run. Compiled for the baseline only.
#include "cpu/op_table.h"

namespace pycircuit {

extern const OpTable op_table_baseline;
#ifdef PYCIRCUIT_HAS_V3
extern const OpTable op_table_v3;
#endif
#ifdef PYCIRCUIT_HAS_V4
extern const OpTable op_table_v4;
#endif

namespace {

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

}  // namespace

int isa_count() {
  int count = 1;
#ifdef PYCIRCUIT_HAS_V3
  ++count;
#endif
#ifdef PYCIRCUIT_HAS_V4
  ++count;
#endif
  return count;
}

IsaEntry isa_entry(int i) {
#ifdef PYCIRCUIT_HAS_V3
  if (i == 1) return {&op_table_v3, machine_has_v3()};
#endif
#ifdef PYCIRCUIT_HAS_V4
  if (i == 2) return {&op_table_v4, machine_has_v4()};
#endif
  (void)i;
  return {&op_table_baseline, true};
}

}  // namespace pycircuit
