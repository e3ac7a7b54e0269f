#ifndef JAX_EP_CPU_THREADS_H_
#define JAX_EP_CPU_THREADS_H_

#include <cstdint>
#include <functional>

namespace jax_ep::cpu {

// Runs `task` on a thread of its own, so that tasks may wait for each other without limit; threads
// are reused when idle.
void RunOnOwnThread(std::function<void()> task);

// Calls body(0) ... body(n - 1), each once, on all cores including the caller's. Bodies must not
// wait.
void ParallelFor(int64_t n, const std::function<void(int64_t)>& body);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_CPU_THREADS_H_
