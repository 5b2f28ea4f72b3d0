// How many processors this process may use: what its affinity and its control group leave it.
#pragma once

#include <string>

namespace rnnfast {

// At least 1. More spinning threads than that only get in each other's way. The affinity is asked
// for each time, since a process may be pinned later; the group's quota once.
int usable_processors();

// For tests: as if there were so many; 0: as there are. Returns what was assumed before.
int assume_processors(int count);

// Processors that a control group's quota amounts to, rounded up; 0: no quota, or none to be found.
// `groups` is the text of /proc/self/cgroup, `root` where the hierarchies are mounted.
int processors_by_quota(const std::string& groups, const std::string& root);

}  // namespace rnnfast
