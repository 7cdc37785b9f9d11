#include "cpu/threads.h"

#include <atomic>

#if defined(__linux__)
#include <dirent.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace epsa::cpu {
namespace {

std::atomic<bool> threads_lost{false};
bool had_threads = false;  // the parent, just before a fork

bool process_has_threads() {
#if defined(__linux__)
  if (DIR* tasks = opendir("/proc/self/task")) {
    int count = 0;
    while (const dirent* entry = readdir(tasks)) {
      count += entry->d_name[0] != '.';
    }
    closedir(tasks);
    return count > 1;
  }
#endif
  return true;  // unknown, and this answer is the safe one
}

#if defined(__unix__) || defined(__APPLE__)
const int registered = pthread_atfork(
    [] { had_threads = process_has_threads(); }, nullptr,
    [] { threads_lost = threads_lost || had_threads; });
#endif

}  // namespace

int64_t usable_threads() {
  return threads_lost || at::in_parallel_region() ? 1 : at::get_num_threads();
}

}  // namespace epsa::cpu
