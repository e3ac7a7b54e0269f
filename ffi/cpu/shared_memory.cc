#include "cpu/shared_memory.h"

#include <cerrno>
#include <cstring>
#include <utility>

#ifdef __linux__
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace jax_ep::cpu {

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(fd_, other.fd_);
  return *this;
}

#ifdef __linux__

namespace {
std::string Failed(const std::string& what) { return what + " failed: " + std::strerror(errno); }
}  // namespace

SharedMemory::~SharedMemory() {
  if (data_ != nullptr) munmap(data_, bytes_);
  if (fd_ >= 0) close(fd_);
}

std::string SharedMemory::Map(size_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_, 0);
  if (at == MAP_FAILED)
    return Failed("mapping " + std::to_string(bytes) + " bytes of shared memory");
  data_ = static_cast<std::byte*>(at);
  bytes_ = bytes;
  return "";
}

std::string SharedMemory::Create(size_t bytes) {
  fd_ = memfd_create("jax_ep", MFD_CLOEXEC);
  if (fd_ < 0) return Failed("memfd_create");
  if (ftruncate(fd_, static_cast<off_t>(bytes)) != 0) return Failed("ftruncate");
  return Map(bytes);
}

// The kernel lets only the same user (or root) through here, as it would a debugger.
std::string SharedMemory::Open(int32_t pid, int32_t fd, size_t bytes) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
  fd_ = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd_ < 0) return Failed("opening " + path);
  return Map(bytes);
}

#else

SharedMemory::~SharedMemory() = default;

namespace {
const char kLinuxOnly[] =
    "CPU groups across processes need Linux; use implementation=\"reference\"";
}  // namespace

std::string SharedMemory::Map(size_t) { return kLinuxOnly; }
std::string SharedMemory::Create(size_t bytes) { return Map(bytes); }
std::string SharedMemory::Open(int32_t, int32_t, size_t bytes) { return Map(bytes); }

#endif

}  // namespace jax_ep::cpu
