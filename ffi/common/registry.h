// Communicators by id, for handlers that know nothing but an attribute of their call.
#ifndef JAX_EP_COMMON_REGISTRY_H_
#define JAX_EP_COMMON_REGISTRY_H_

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

namespace jax_ep {

template <typename Communicator>
class Registry {
 public:
  // Lives as long as the process: handlers may still run while static objects are destroyed.
  static Registry& Get() {
    static auto* registry = new Registry;
    return *registry;
  }

  void Add(std::shared_ptr<Communicator> communicator) {
    std::lock_guard<std::mutex> lock(mutex_);
    communicators_[communicator->spec().id] = std::move(communicator);
  }
  void Remove(int64_t id) {
    std::shared_ptr<Communicator> last;  // destroyed after the lock is gone
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = communicators_.find(id);
    if (it == communicators_.end()) return;
    last = std::move(it->second);
    communicators_.erase(it);
  }
  std::shared_ptr<Communicator> Find(int64_t id) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = communicators_.find(id);
    return it == communicators_.end() ? nullptr : it->second;
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<Communicator>> communicators_;
};

}  // namespace jax_ep

#endif  // JAX_EP_COMMON_REGISTRY_H_
