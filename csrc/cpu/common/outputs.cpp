// Keeps the memory of large tensors between calls. The system provides memory page by page and
// clears each page, and a network frees memory as fast as it asks for it. One pass over 8 MB of new
// memory took 9 to 11 ms, over used memory 2 ms (two threads of an EPYC Zen 4 in a virtual
// machine).
#include <atomic>
#include <cstdlib>
#include <list>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include "torch.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fastvdm {
namespace {

constexpr int64_t kLarge = 1 << 20;  // the system's allocator keeps smaller blocks itself
constexpr int64_t kHugePage = 1 << 21;

struct Block {
  void* data;
  int64_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::list<Block> free;  // the most recently freed one first
  std::atomic<int64_t> limit{0};
  int64_t bytes = 0;
};

Pool& pool() {  // never destroyed: tensors may outlive every static
  static Pool& found = []() -> Pool& {
    auto* made = new Pool;
    made->limit = megabytes_from_environment("FASTVDM_OUTPUT_POOL_MB", 512);
#if defined(__unix__) || defined(__APPLE__)
    // Hold the mutex during fork; if another thread held it, it would stay locked in the child.
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); },
                   [] { pool().mutex.unlock(); });
#endif
    return *made;
  }();
  return found;
}

// Eight sizes between consecutive powers of two, so that tensors of similar size share blocks.
int64_t size_class(int64_t bytes) {
  int64_t step = kLarge / 8;
  while (bytes > 16 * step) step *= 2;
  return round_up(bytes, step);
}

void* take(int64_t bytes) {
  Pool& p = pool();
  {
    const std::lock_guard lock(p.mutex);
    for (auto it = p.free.begin(); it != p.free.end(); ++it) {
      if (it->bytes != bytes) continue;
      void* data = it->data;
      p.free.erase(it);
      p.bytes -= bytes;
      return data;
    }
  }
  const bool huge = bytes >= kHugePage;  // the size must then be a multiple of the alignment too
  void* data = std::aligned_alloc(huge ? kHugePage : 64, huge ? round_up(bytes, kHugePage) : bytes);
  if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (huge) madvise(data, bytes, MADV_HUGEPAGE);  // a hint, which may fail
#endif
  return data;
}

// `block` has one element, which was made before the tensor, so that nothing is allocated here.
void give_back(std::list<Block>& block) {
  Pool& p = pool();
  std::list<Block> out;
  {
    const std::lock_guard lock(p.mutex);
    if (block.front().bytes > p.limit) {
      out.splice(out.end(), block);
    } else {
      p.bytes += block.front().bytes;
      p.free.splice(p.free.begin(), block);
    }
    while (p.bytes > p.limit) {  // drop the oldest first
      p.bytes -= p.free.back().bytes;
      out.splice(out.end(), p.free, std::prev(p.free.end()));
    }
  }
  for (const Block& block : out) std::free(block.data);
}

struct Owner {
  std::list<Block> block;
  ~Owner() {
    if (!block.empty() && block.front().data != nullptr) give_back(block);
  }
};

}  // namespace

Tensor empty(const Tensor& x, const std::vector<int64_t>& sizes, ScalarType dtype) {
  int64_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  for (int64_t size : sizes) bytes *= size;
  const torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.data(), sizes.size());
  if (bytes < kLarge || pool().limit == 0) return torch::stable::new_empty(x, shape, dtype);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  bytes = size_class(bytes);
  auto owner = std::make_shared<Owner>();
  owner->block.push_back({nullptr, bytes});
  void* data = owner->block.front().data = take(bytes);
  return torch::stable::from_blob(data, shape, {strides.data(), strides.size()}, x.device(), dtype,
                                  [owner](void*) {});  // owner is destroyed with the tensor
}

int64_t set_output_pool_limit(int64_t bytes) {
  STD_TORCH_CHECK(bytes >= 0, "the limit of the output pool must be >= 0 bytes, got ", bytes);
  Pool& p = pool();
  std::list<Block> out;
  int64_t before;
  {
    const std::lock_guard lock(p.mutex);
    before = p.limit.exchange(bytes);
    if (p.bytes > bytes) {
      out.swap(p.free);
      p.bytes = 0;
    }
  }
  for (const Block& block : out) std::free(block.data);
  return before;
}

int64_t output_pool_bytes() {
  const std::lock_guard lock(pool().mutex);
  return pool().bytes;
}

}  // namespace fastvdm
