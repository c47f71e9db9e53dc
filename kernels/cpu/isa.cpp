#include "kernels/cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef FASTCONV_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastconv {

#define FASTCONV_DECLARE(isa)   \
  namespace isa {               \
  extern const Kernels kernels; \
  }
FASTCONV_DECLARE(scalar)
#ifdef FASTCONV_HAS_AVX2
FASTCONV_DECLARE(avx2)
#endif
#ifdef FASTCONV_HAS_AVX512
FASTCONV_DECLARE(avx512)
#endif
#ifdef FASTCONV_HAS_NEON
FASTCONV_DECLARE(neon)
#endif

#ifdef FASTCONV_HAS_AMX
namespace amx {

extern void (*const split)(const Pointwise&, Range pixels, const DigitPixels& parts);
extern void (*const multiply)(const Pointwise&, Range pixels, Range panels, const DigitPixels& parts);

// AVX-512's table with the matrix unit's kernels. (Made here: no code compiled for an ISA may run before that ISA is chosen.)
const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels made = avx512::kernels;
    made.isa = "amx";
    made.info[0].tile = "16x16 in digits, else 14x32, 8x48, 14x16";
    made.digits_split = split;
    made.digits_multiply = multiply;
    return made;
  }();
  return table;
}

// Whether the CPU has it and the system lets this process use it, which Linux wants to be asked once.
bool supported() {
  static const bool granted = [] {
    constexpr unsigned BYTE_PERMUTATIONS = 1u << 1, TILES = 1u << 24, INT8 = 1u << 25;  // of leaf 7's ecx, and of its edx
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;                                    // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
#ifdef FASTCONV_EMULATED_TILES
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & BYTE_PERMUTATIONS);
#endif
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(c & BYTE_PERMUTATIONS) || !(d & TILES) || !(d & INT8)) return false;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  }();
  return granted;
}

}  // namespace amx
#endif

namespace {

struct Entry {
  const Kernels* kernels;
  bool supported;
};

// Slowest first. The compiler's built-in check also asks whether the operating system saves the registers.
std::vector<Entry> table() {
  std::vector<Entry> entries{{&scalar::kernels, true}};
#ifdef FASTCONV_HAS_AVX2
  entries.push_back({&avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
#ifdef FASTCONV_HAS_AVX512
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq");
  entries.push_back({&avx512::kernels, avx512});
#ifdef FASTCONV_HAS_AMX
  entries.push_back({&amx::kernels(), avx512 && amx::supported()});
#endif
#endif
#ifdef FASTCONV_HAS_NEON
  entries.push_back({&neon::kernels, true});  // part of the aarch64 baseline
#endif
  return entries;
}

std::atomic<const Kernels*> active{nullptr};

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : table())
    if (entry.supported) names.push_back(entry.kernels->isa);
  return names;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : table()) names.push_back(entry.kernels->isa);
  return names;
}

const Kernels& kernels() {
  const Kernels* chosen = active.load(std::memory_order_relaxed);
  if (!chosen) [[unlikely]] {
    choose_isa();
    chosen = active.load();
  }
  return *chosen;
}

bool fetches_for_vectors() {
#if defined(__x86_64__)
  static const bool intel = __builtin_cpu_is("intel");
  return !intel;
#else
  return true;
#endif
}

void set_isa(const std::string& name) {
  for (const Entry& entry : table())
    if (name == entry.kernels->isa && entry.supported) {
      active.store(entry.kernels);
      return;
    }
  std::string got = name;
  for (char& c : got)
    if (c < ' ' || c > '~') c = '?';  // a message that is no UTF-8 would become an error about that
  throw std::invalid_argument("FASTCONV_ISA must be one of " + listed(supported_isas()) + " on this machine, got '" + got + "'");
}

void choose_isa() {
  const char* forced = std::getenv("FASTCONV_ISA");
  set_isa(forced && *forced ? forced : supported_isas().back());
}

}  // namespace fastconv
