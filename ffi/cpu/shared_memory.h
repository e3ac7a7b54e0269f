#ifndef JAX_EP_CPU_SHARED_MEMORY_H_
#define JAX_EP_CPU_SHARED_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace jax_ep::cpu {

// Memory that other processes of the same user on the same host can map. It has no name in any file
// system: it goes with the last process that maps it, however that one ends. Pages take memory when
// they are first written.
class SharedMemory {
 public:
  SharedMemory() = default;
  ~SharedMemory();
  SharedMemory(SharedMemory&& other) noexcept { *this = static_cast<SharedMemory&&>(other); }
  SharedMemory& operator=(SharedMemory&& other) noexcept;

  // Both return an error text, empty on success.
  std::string Create(size_t bytes);
  std::string Open(int32_t pid, int32_t fd, size_t bytes);

  std::byte* data() const { return data_; }
  int32_t fd() const { return fd_; }

 private:
  std::string Map(size_t bytes);

  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
  int32_t fd_ = -1;
};

}  // namespace jax_ep::cpu

#endif  // JAX_EP_CPU_SHARED_MEMORY_H_
