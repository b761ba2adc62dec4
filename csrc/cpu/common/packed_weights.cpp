// The cache of packed weights. A weight is identified by its address, sizes and strides, and
// verified by a hash of its whole content at every call: no version counter detects
// `p.data.copy_()`, another tensor at the address of a freed one, or changes by the users of an
// exported network.
#include "packed_weights.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <list>
#include <map>
#include <mutex>
#include <utility>

#include "../launchers.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fastvdm {
namespace {

constexpr int64_t kIdleCalls = 4096;  // an entry not used for this many calls is dropped

using Key = std::array<int64_t, 12>;  // address, four sizes, four strides, dtype, form, ISA
using Hash = std::array<uint64_t, 2>;

struct Entry {
  Hash hash;
  std::optional<Tensor> packed;
  int64_t bytes = 0;  // of packed
  int64_t seen = 0;   // the call that last asked for it
};

struct Cache {
  std::mutex mutex;
  std::map<Key, Entry> entries;
  int64_t limit = 0, bytes = 0, kept = 0, calls = 0, hits = 0;

  // The packed tensor is returned for the caller to destroy after it has released the mutex.
  std::optional<Tensor> release(Entry& entry) {
    if (entry.packed.has_value()) {
      bytes -= entry.bytes;
      --kept;
    }
    return std::exchange(entry.packed, std::nullopt);
  }
};

// Never destroyed: at exit torch's allocator may be destroyed before a static of this library.
Cache& cache() {
  static Cache& found = []() -> Cache& {
    auto* made = new Cache;
    made->limit = megabytes_from_environment("FASTVDM_PACKED_WEIGHTS_MB", 2048);
#if defined(__unix__) || defined(__APPLE__)
    // Hold the mutex during fork; if another thread held it, it would stay locked in the child.
    pthread_atfork([] { cache().mutex.lock(); }, [] { cache().mutex.unlock(); },
                   [] { cache().mutex.unlock(); });
#endif
    return *made;
  }();
  return found;
}

// Whether the weight can be hashed, and how.
bool describe(const Tensor& weight, WeightHashArgs& a) {
  if (weight.dim() > 4) return false;
  std::vector<std::pair<int64_t, int64_t>> all, dims;  // (stride, size), the largest stride first
  for (int64_t d = 0; d < weight.dim(); ++d)
    if (weight.size(d) != 1) all.emplace_back(weight.stride(d), weight.size(d));
  std::sort(all.begin(), all.end(), std::greater<>());
  for (const auto& [stride, size] : all) {
    if (!dims.empty() && dims.back().first == stride * size)  // one stride covers both
      dims.back() = {stride, dims.back().second * size};
    else
      dims.emplace_back(stride, size);
  }
  const int n = static_cast<int>(dims.size());
  a.data = weight.const_data_ptr();
  a.bytes = static_cast<int>(weight.element_size());
  a.run = n > 0 ? dims[n - 1].second : 1;
  a.step = n > 0 ? dims[n - 1].first : 1;
  for (int d = 0; d < 3; ++d) {
    const int from = n - 4 + d;
    a.strides[d] = from >= 0 ? dims[from].first : 0;
    a.sizes[d] = from >= 0 ? dims[from].second : 1;
  }
  a.units = ceil_div(a.run * a.bytes, 4 * kHashUnit);
  return a.units * a.sizes[0] * a.sizes[1] * a.sizes[2] <= kHashUnits;
}

Hash hash_of(const WeightHashArgs& a) {
  std::atomic<uint64_t> first{0}, second{0};
  const auto kernel = FASTVDM_PICK(weight_hash);
  const int64_t units = a.units * a.sizes[0] * a.sizes[1] * a.sizes[2];
  torch::stable::parallel_for(0, units, 128, [&](int64_t begin, int64_t end) {
    uint64_t sums[2] = {0, 0};
    kernel(a, begin, end, sums);
    first += sums[0];  // integers, so the order does not matter
    second += sums[1];
  });
  return {first, second};
}

// Frees `wanted` bytes by dropping entries that were not used since call `since`, the oldest first.
// A network above the limit uses its weights in turn: if the oldest entry always gave way, none
// would survive until its next use.
bool make_room(Cache& c, int64_t wanted, int64_t since, std::list<Tensor>& freed) {
  std::vector<Entry*> idle;
  int64_t left = c.bytes;
  for (auto& [key, entry] : c.entries)
    if (entry.packed.has_value() && entry.seen < since) {
      idle.push_back(&entry);
      left -= entry.bytes;
    }
  if (left + wanted > c.limit) return false;
  std::sort(idle.begin(), idle.end(), [](Entry* a, Entry* b) { return a->seen < b->seen; });
  for (size_t i = 0; c.bytes + wanted > c.limit; ++i) freed.push_back(*c.release(*idle[i]));
  return true;
}

}  // namespace

Tensor packed_weights(const Tensor& weight, int64_t form, const std::function<Tensor()>& pack) {
  Cache& c = cache();
  WeightHashArgs a{};
  bool off;
  {
    const std::lock_guard lock(c.mutex);
    off = c.limit == 0;
  }
  if (off || !describe(weight, a)) return pack();  // without the mutex, because it allocates
  Key key{};
  key[0] = reinterpret_cast<int64_t>(a.data);
  for (int64_t d = 0; d < weight.dim(); ++d) {
    key[1 + d] = weight.size(d);
    key[5 + d] = weight.stride(d);
  }
  key[9] = static_cast<int64_t>(weight.scalar_type());
  key[10] = form;
  key[11] = static_cast<int64_t>(isa());  // the order of the elements depends on the kernels
  const Hash hash = hash_of(a);

  int64_t before = 0;  // the earlier call that found this content here
  std::list<Tensor> freed;
  {
    const std::lock_guard lock(c.mutex);
    const int64_t now = ++c.calls;
    if (now % 256 == 0)
      for (auto at = c.entries.begin(); at != c.entries.end();) {
        if (now - at->second.seen <= kIdleCalls) {
          ++at;
          continue;
        }
        if (auto packed = c.release(at->second)) freed.push_back(*packed);
        at = c.entries.erase(at);
      }
    Entry& entry = c.entries[key];
    if (entry.seen != 0 && entry.hash == hash) {
      before = std::exchange(entry.seen, now);
      if (entry.packed.has_value()) {
        ++c.hits;
        return *entry.packed;
      }
    } else {
      if (auto packed = c.release(entry)) freed.push_back(*packed);
      entry.hash = hash;
      entry.seen = now;
    }
  }
  freed.clear();
  Tensor packed = pack();
  if (before == 0) return packed;  // content found only once may be that of a training step
  const std::lock_guard lock(c.mutex);
  const auto at = c.entries.find(key);
  if (at == c.entries.end() || at->second.hash != hash || at->second.packed.has_value())
    return packed;  // another thread was faster
  const int64_t bytes = packed.numel() * packed.element_size();
  if (c.bytes + bytes > c.limit && !make_room(c, bytes, before, freed)) return packed;
  at->second.packed = packed;
  at->second.bytes = bytes;
  c.bytes += bytes;
  ++c.kept;
  return packed;
}

int64_t set_packed_weights_limit(int64_t bytes) {
  STD_TORCH_CHECK(bytes >= 0, "packed weights: the limit must not be negative, got ", bytes);
  Cache& c = cache();
  std::map<Key, Entry> dropped;  // destroyed after the lock
  const std::lock_guard lock(c.mutex);
  if (bytes < c.bytes || bytes == 0) {
    dropped.swap(c.entries);
    c.bytes = c.kept = 0;
  }
  return std::exchange(c.limit, bytes);
}

std::tuple<int64_t, int64_t, int64_t, int64_t> packed_weights_state() {
  Cache& c = cache();
  const std::lock_guard lock(c.mutex);
  return {c.bytes, c.kept, static_cast<int64_t>(c.entries.size()), c.hits};
}

}  // namespace fastvdm
