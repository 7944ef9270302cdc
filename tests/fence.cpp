// Memory whose end is the end of a page, nothing behind it: linked into the kernel, whatever flags compiled that, it makes a
// number that is read or written behind a vector's last a segmentation fault. Never freed.

#include <sys/mman.h>

#include <cstdlib>
#include <new>

static void *fenced(std::size_t bytes, std::size_t alignment) {
  constexpr std::size_t PAGE = 4096;
  bytes = (bytes + alignment - 1) / alignment * alignment;
  const std::size_t pages = (bytes + PAGE - 1) / PAGE * PAGE;
  void *start = mmap(nullptr, pages + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED || mprotect((char *)start + pages, PAGE, PROT_NONE)) std::abort();
  return (char *)start + pages - bytes;
}

void *operator new(std::size_t bytes) { return fenced(bytes, __STDCPP_DEFAULT_NEW_ALIGNMENT__); }
void *operator new(std::size_t bytes, std::align_val_t alignment) { return fenced(bytes, std::size_t(alignment)); }
void operator delete(void *) noexcept {}
void operator delete(void *, std::size_t) noexcept {}
void operator delete(void *, std::align_val_t) noexcept {}
void operator delete(void *, std::size_t, std::align_val_t) noexcept {}
