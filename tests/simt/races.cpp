// A race detector for the shared memory of a block, linked to a kernel that g++ compiles with -fsanitize=thread.
//
// The compiler calls a function at each access to memory, whose place is looked up with addr2line. An access conflicts
// with one of another thread to the same two bytes if one of them writes, or only one of them is atomic, unless a barrier
// of the block, or a __syncwarp of their warp, is between them. Two writes of one value do not conflict. Shuffles and
// votes order no memory. An asynchronous copy writes at any time between its begin and its wait. A conflict ends the
// program.
//
// Without a barrier of the block between them, all accesses of a warp come before those of the next warp (see simt.h): so
// the last warp and lanes with an access of a kind are enough.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" char __bss_start __attribute__((visibility("hidden"))), _end __attribute__((visibility("hidden")));

namespace {

constexpr int GRAIN = 2, WARP = 32, KINDS = 3;
enum Kind { reads, writes, adds };
const char* const VERBS[] = {"reads", "writes", "adds to"};

// The accesses of one kind to a grain since the last barrier of the block.
struct Accesses {
  uint32_t block_epoch = 0, warp_epoch = 0, warps = 0, lanes = 0;
  int warp = 0;
  const void* place = nullptr;
};

struct Grain {
  Accesses of[KINDS];
  const void* copied_from = nullptr;  // the place of an asynchronous copy that is not done
};

// A write over another thread's, which is about to be done: the bytes must stay as they are.
struct Rewrite {
  const void* to = nullptr;
  size_t size = 0;
  char before[16];
  const void *place = nullptr, *earlier = nullptr;
};

Rewrite rewrite;
uint32_t block_epoch = 1;
uint32_t warp_epochs[1024];
int current = -1;
const void* product_place = nullptr;  // of the product that is done
std::vector<Grain> grains;

// "rows.cuh:12 from norm.cu:34": where in the kernel's source the call that returns to `address` is, and where its function
// is inlined.
void print_place(const void* address) {
  Dl_info library;
  dladdr(address, &library);
  char command[4096], function[512], line[512];
  std::snprintf(command, sizeof command, "addr2line -s -i -f -e '%s' %#tx", library.dli_fname,
                static_cast<const char*>(address) - 1 - static_cast<const char*>(library.dli_fbase));
  FILE* lines = popen(command, "r");
  const char* before = "";
  while (lines && std::fgets(function, sizeof function, lines) && std::fgets(line, sizeof line, lines)) {
    line[std::strcspn(line, " \n")] = 0;
    if (std::strncmp(line, "simt.h:", 7) == 0) continue;
    std::fprintf(stderr, "%s%s", before, line);
    before = " from ";
  }
  if (lines) pclose(lines);
}

[[noreturn]] void fail(Kind kind, const void* place, const char* what, const void* earlier) {
  std::fprintf(stderr, "simt: a race: thread %d %s shared memory at ", current, VERBS[kind]);
  print_place(place);
  std::fprintf(stderr, ", %s at ", what);
  print_place(earlier);
  std::fprintf(stderr, "\n");
  std::abort();
}

bool conflicts(const Accesses& earlier) {
  if (earlier.block_epoch != block_epoch) return false;
  const int warp = current / WARP;
  if (earlier.warps & ~(1u << warp)) return true;
  return earlier.warp == warp && earlier.warp_epoch == warp_epochs[current] && earlier.lanes & ~(1u << current % WARP);
}

void record(Accesses& accesses, const void* place) {
  const int warp = current / WARP;
  if (accesses.block_epoch != block_epoch) accesses.warps = 0;
  if (!accesses.warps || accesses.warp != warp || accesses.warp_epoch != warp_epochs[current]) accesses.lanes = 0;
  accesses.block_epoch = block_epoch, accesses.warp = warp, accesses.warp_epoch = warp_epochs[current];
  accesses.warps |= 1u << warp, accesses.lanes |= 1u << current % WARP;
  accesses.place = place;
}

inline bool is_shared(const void* address) {
  return static_cast<size_t>(static_cast<const char*>(address) - &__bss_start) < static_cast<size_t>(&_end - &__bss_start);
}

// The grains of `size` bytes; none if the memory is not shared, or no thread of the block runs.
template <class Do>
inline void for_grains(const void* address, size_t size, Do&& perform) {
  if (current < 0 || !is_shared(address)) return;
  const size_t offset = static_cast<const char*>(address) - &__bss_start;
  if (grains.empty()) grains.resize((&_end - &__bss_start) / GRAIN + 1);
  for (size_t grain = offset / GRAIN; grain <= (offset + size - 1) / GRAIN; ++grain) perform(grains[grain]);
}

// Whether the last write over another thread's has changed nothing.
inline void check_rewrite() {
  if (!rewrite.to) return;
  if (std::memcmp(rewrite.to, rewrite.before, rewrite.size))
    fail(writes, rewrite.place, "which another thread writes", rewrite.earlier);
  rewrite.to = nullptr;
}

__attribute__((noinline)) void access_shared(const void* address, size_t size, Kind kind, const void* place) {
  check_rewrite();
  if (product_place) place = product_place;
  for_grains(address, size, [&](Grain& grain) {
    if (grain.copied_from) fail(kind, place, "to which a copy is begun and not waited for", grain.copied_from);
    if (kind != reads && conflicts(grain.of[reads]))
      fail(kind, place, "which another thread reads", grain.of[reads].place);
    if (kind != adds && conflicts(grain.of[adds]))
      fail(kind, place, "to which another thread adds", grain.of[adds].place);
    if (conflicts(grain.of[writes])) {
      if (kind != writes || size > sizeof rewrite.before)
        fail(kind, place, "which another thread writes", grain.of[writes].place);
      rewrite = {address, size, {}, place, grain.of[writes].place};
      std::memcpy(rewrite.before, address, size);
    }
    record(grain.of[kind], place);
  });
}

// Most accesses are to other memory. These change no shared byte, so the check of a rewrite waits for the next one.
inline void access(const void* address, size_t size, Kind kind, const void* place) {
  if (__builtin_expect(is_shared(address), 0)) access_shared(address, size, kind, place);
}

}  // namespace

extern "C" {

// Thread `thread` of the block runs; -1 for none.
void races_run_thread(int thread) {
  check_rewrite();
  current = thread;
}
void races_pass_block_barrier() { ++block_epoch; }
void races_pass_warp_barrier() { ++warp_epochs[current]; }
void races_add(const void* to, const void* place) { access(to, 4, adds, place); }
void races_set_place(const void* place) { product_place = place; }
void races_begin_copy(const void* to) {
  access(to, 16, writes, __builtin_return_address(0));
  for_grains(to, 16, [&](Grain& grain) { grain.copied_from = __builtin_return_address(0); });
}
void races_end_copy(const void* to) {
  for_grains(to, 16, [](Grain& grain) { grain.copied_from = nullptr; });
}

#define ACCESS(SIZE)                                                                                               \
  void __tsan_read##SIZE(void* from) { access(from, SIZE, reads, __builtin_return_address(0)); }                   \
  void __tsan_write##SIZE(void* to) { access(to, SIZE, writes, __builtin_return_address(0)); }                     \
  void __tsan_unaligned_read##SIZE(void* from) { access(from, SIZE, reads, __builtin_return_address(0)); }         \
  void __tsan_unaligned_write##SIZE(void* to) { access(to, SIZE, writes, __builtin_return_address(0)); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
#undef ACCESS
void __tsan_read_range(void* from, size_t size) { access(from, size, reads, __builtin_return_address(0)); }
void __tsan_write_range(void* to, size_t size) { access(to, size, writes, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
