// Preloaded into a process: after arm(n, least, library) its nth allocation of at least so many bytes fails, counted where `library`'s
// code asks for it, or anywhere if that is null. seen() says how many there were. arm(0, ...) ends it.
#include <dlfcn.h>
#include <errno.h>
#include <link.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
}

namespace {

std::atomic<int64_t> armed{0}, count{0};
size_t smallest = 0;
uintptr_t first = 0, last = UINTPTR_MAX;  // the code that counts

int find(dl_phdr_info* object, size_t, void* name) {
  if (!std::strstr(object->dlpi_name, static_cast<const char*>(name))) return 0;
  for (int i = 0; i < object->dlpi_phnum; ++i)
    if (object->dlpi_phdr[i].p_flags & PF_X) {
      first = object->dlpi_addr + object->dlpi_phdr[i].p_vaddr;
      last = first + object->dlpi_phdr[i].p_memsz;
    }
  return 1;
}

bool fails(size_t bytes, void* caller) {
  const int64_t nth = armed.load();
  const uintptr_t from = reinterpret_cast<uintptr_t>(caller);
  return nth != 0 && bytes >= smallest && from >= first && from < last && ++count == nth;
}

}  // namespace

extern "C" {

// Returns whether the library is there.
bool arm(int64_t nth, size_t least, const char* library) {
  armed = 0;
  count = 0;
  smallest = least;
  first = 0;
  last = UINTPTR_MAX;
  const bool found = !library || dl_iterate_phdr(find, const_cast<char*>(library));
  armed = nth;
  return found;
}
int64_t seen() { return count; }

void* malloc(size_t bytes) { return fails(bytes, __builtin_return_address(0)) ? nullptr : __libc_malloc(bytes); }
void* calloc(size_t n, size_t bytes) { return fails(n * bytes, __builtin_return_address(0)) ? nullptr : __libc_calloc(n, bytes); }
void* realloc(void* old, size_t bytes) { return fails(bytes, __builtin_return_address(0)) ? nullptr : __libc_realloc(old, bytes); }
void* aligned_alloc(size_t alignment, size_t bytes) {
  return fails(bytes, __builtin_return_address(0)) ? nullptr : __libc_memalign(alignment, bytes);
}
int posix_memalign(void** block, size_t alignment, size_t bytes) {
  if (fails(bytes, __builtin_return_address(0))) return ENOMEM;
  *block = __libc_memalign(alignment, bytes);
  return *block ? 0 : ENOMEM;
}

}  // extern "C"

// operator new asks libstdc++'s malloc, whose caller is libstdc++: counted here.
void* operator new(size_t bytes) {
  void* block = fails(bytes, __builtin_return_address(0)) ? nullptr : __libc_malloc(bytes);
  if (!block) throw std::bad_alloc();
  return block;
}
void* operator new[](size_t bytes) {
  void* block = fails(bytes, __builtin_return_address(0)) ? nullptr : __libc_malloc(bytes);
  if (!block) throw std::bad_alloc();
  return block;
}
void* operator new(size_t bytes, std::align_val_t alignment) {
  void* block = fails(bytes, __builtin_return_address(0)) ? nullptr : __libc_memalign(static_cast<size_t>(alignment), bytes);
  if (!block) throw std::bad_alloc();
  return block;
}
void* operator new[](size_t bytes, std::align_val_t alignment) {
  void* block = fails(bytes, __builtin_return_address(0)) ? nullptr : __libc_memalign(static_cast<size_t>(alignment), bytes);
  if (!block) throw std::bad_alloc();
  return block;
}
