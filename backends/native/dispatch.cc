// Which instruction set is used: the best this processor has, or the one that DYNCOMP_NATIVE_ISA names.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dyncomp {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool halves = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);  // F16C
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && halves;
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
#endif

struct Choice {
  const Kernels* kernels;
  const char* reason;
};

Choice choose() {
  const char* name = std::getenv("DYNCOMP_NATIVE_ISA");
  const bool any = name == nullptr || *name == '\0';
  if (!any && std::strcmp(name, "portable") && std::strcmp(name, "avx2") && std::strcmp(name, "avx512")) {
    return {nullptr, "DYNCOMP_NATIVE_ISA is none of portable, avx2, avx512"};
  }
#if defined(__x86_64__)
  __builtin_cpu_init();
  if ((any || !std::strcmp(name, "avx512")) && has_avx512()) return {&avx512_kernels, nullptr};
  if ((any || !std::strcmp(name, "avx2")) && has_avx2()) return {&avx2_kernels, nullptr};
#endif
  if (any || !std::strcmp(name, "portable")) return {&portable_kernels, nullptr};
  return {nullptr, "DYNCOMP_NATIVE_ISA asks for an instruction set that this processor does not have"};
}

}  // namespace

const Kernels* kernels(const char** reason) {
  static const Choice choice = choose();
  *reason = choice.reason;
  return choice.kernels;
}

}  // namespace dyncomp

// "portable", "avx2" or "avx512"; "" when what DYNCOMP_NATIVE_ISA asks for is not there.
extern "C" __attribute__((visibility("default"))) const char* dyncomp_native_isa() {
  const char* reason;
  const dyncomp::Kernels* kernels = dyncomp::kernels(&reason);
  return kernels ? kernels->name : "";
}
