#include "processors.h"

#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>
#include <sstream>
#include <thread>

namespace rnnfast {
namespace {

int rounded_up(double quota, double period) {
  return quota > 0 && period > 0 ? std::max(1, static_cast<int>(std::ceil(quota / period))) : 0;
}

// "max 100000" or "150000 100000" (version 2)
int quota_in(const std::string& folder) {
  std::ifstream file(folder + "/cpu.max");
  double quota = 0, period = 0;
  return file >> quota >> period ? rounded_up(quota, period) : 0;
}

// The same in two files (version 1); -1 is no quota.
int old_quota_in(const std::string& folder) {
  std::ifstream quota_file(folder + "/cpu.cfs_quota_us"),
      period_file(folder + "/cpu.cfs_period_us");
  double quota = 0, period = 0;
  return quota_file >> quota && period_file >> period ? rounded_up(quota, period) : 0;
}

// The least of a group and all above it. A container may see the path that its host knows while its
// own group is mounted as the root, so folders that are not there are passed over.
int least(const std::string& mount, std::string group, int (*quota_of)(const std::string&)) {
  int found = 0;
  for (;;) {
    const int here = quota_of(mount + group);
    if (here > 0) found = found > 0 ? std::min(found, here) : here;
    const size_t slash = group.rfind('/');
    if (slash == std::string::npos) return found;
    group.resize(slash);
  }
}

bool lists_cpu(const std::string& controllers) {
  std::istringstream names(controllers);
  for (std::string name; std::getline(names, name, ',');)
    if (name == "cpu") return true;
  return false;
}

int quota() {
#ifdef __linux__
  static const int processors = [] {
    std::ifstream file("/proc/self/cgroup");
    std::stringstream groups;
    groups << file.rdbuf();
    return processors_by_quota(groups.str(), "/sys/fs/cgroup");
  }();
  return processors;
#else
  return 0;
#endif
}

int by_affinity() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    const int count = CPU_COUNT(&set);
    if (count > 0) return count;
  }
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? static_cast<int>(count) : 1;
}

}  // namespace

int processors_by_quota(const std::string& groups, const std::string& root) {
  std::istringstream lines(groups);
  int found = 0;
  for (std::string line; std::getline(lines, line);) {  // "0::/path" or "4:cpu,cpuacct:/path"
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    int here = 0;
    if (controllers.empty())
      here = least(root, group, quota_in);
    else if (lists_cpu(controllers))
      here = least(root + "/" + controllers, group, old_quota_in);
    if (here > 0) found = found > 0 ? std::min(found, here) : here;
  }
  return found;
}

namespace {
std::atomic<int> assumed{0};
}

int assume_processors(int count) { return assumed.exchange(count); }

int usable_processors() {
  if (const int count = assumed.load(std::memory_order_relaxed)) return count;
  const int affinity = by_affinity(), allowed = quota();
  return allowed > 0 ? std::min(affinity, allowed) : affinity;
}

}  // namespace rnnfast
