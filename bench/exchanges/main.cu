// What one time step of a recurrent layer pays for telling its h to the rest of the GPU: barriers,
// flags, polled data, clusters, launches, and two ceilings. Prints one JSON object.
//
//   exchanges [--repeats 15] [--steps 2000] [--seconds 120] [--only PART_OF_A_NAME]
//
// A row holds the median over `n` repetitions of the microseconds a step, and `spread`, the
// interquartile range over the median; every payload is compared with what was sent. The status is
// 1 where a payload was wrong, a wait was given up or CUDA had an error. Without a GPU the
// rows say so and the status is 0.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "ops.cuh"

namespace exchanges {
namespace {

// Keeps the GPU busy, so that the first row finds it at its working clock.
__global__ void warm_up(long long cycles) {
  for (const long long start = clock64(); clock64() - start < cycles;) continue;
}

struct Row {
  Case what;
  std::string status;
  Measured measured;
};

double quantile(std::vector<double> values, double part) {
  std::sort(values.begin(), values.end());
  const double place = part * static_cast<double>(values.size() - 1);
  const size_t below = static_cast<size_t>(place), above = std::min(below + 1, values.size() - 1);
  return values[below] + (place - static_cast<double>(below)) * (values[above] - values[below]);
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char letter : text) {
    if (letter == '"' || letter == '\\') out += '\\';
    out += static_cast<unsigned char>(letter) < ' ' ? ' ' : letter;
  }
  return out + '"';
}

void print(const Row& row) {
  std::printf("    {\"name\": %s, \"parameters\": {", quoted(row.what.name).c_str());
  Parameters parameters = row.what.parameters;
  parameters.insert(parameters.end(), row.measured.found.begin(), row.measured.found.end());
  const char* comma = "";
  for (const auto& [name, value] : parameters) {
    std::printf("%s%s: %lld", comma, quoted(name).c_str(), value);
    comma = ", ";
  }
  std::printf("}, \"status\": %s", quoted(row.status).c_str());
  const std::vector<double>& times = row.measured.microseconds;
  if (!times.empty()) {
    const double median = quantile(times, 0.5);
    const double spread = (quantile(times, 0.75) - quantile(times, 0.25)) / median;
    std::printf(", \"microseconds\": %.4f, \"spread\": %.4f, \"n\": %zu", median, spread,
                times.size());
    if (row.measured.bytes > 0)
      std::printf(", \"gigabytes_per_second\": %.1f", row.measured.bytes / median * 1e-3);
  }
  std::printf("}");
}

// The whole result; `device` is JSON.
void print(const std::vector<Row>& rows, const std::string& device) {
  std::printf("{\n  \"program\": \"exchanges\",\n  \"device\": %s,\n  \"rows\": [\n",
              device.c_str());
  for (size_t index = 0; index < rows.size(); ++index) {
    print(rows[index]);
    std::printf(index + 1 < rows.size() ? ",\n" : "\n");
  }
  std::printf("  ]\n}\n");
  std::fflush(stdout);
}

int attribute(cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, 0), "cudaDeviceGetAttribute");
  return value;
}

std::string describe(const Gpu& gpu) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  const auto number = [](const char* name, long long value) {
    return std::string(", \"") + name + "\": " + std::to_string(value);
  };
  const std::string capability =
      std::to_string(properties.major) + "." + std::to_string(properties.minor);
  return "{\"name\": " + quoted(properties.name) +
         ", \"compute_capability\": " + quoted(capability) + number("sms", gpu.sms) +
         number("clock_khz", attribute(cudaDevAttrClockRate)) +
         number("l2_bytes", properties.l2CacheSize) + number("driver", driver) +
         number("runtime", runtime) + "}";
}

std::vector<Row> all_rows(int sms, const std::string& only) {
  std::vector<Row> rows;
  for (auto& group : {grid_cases(sms), flag_cases(sms), in_band_cases(sms), cluster_cases(),
                      launch_cases(), ceiling_cases()})
    for (const Case& what : group)
      if (what.name.find(only) != std::string::npos) rows.push_back({what, "", {}});
  // The first once more at the end: what the two differ by is noise.
  if (!rows.empty()) {
    rows.push_back(rows.front());
    rows.back().what.name += ", again";
  }
  return rows;
}

// Rows that have no status yet get this one.
void settle(std::vector<Row>& rows, const std::string& status) {
  for (Row& row : rows)
    if (row.status.empty()) row.status = status;
}

// One row; true unless something was wrong.
bool measure(const Gpu& gpu, Row& row) {
  try {
    row.measured = row.what.measure(gpu);
    row.status = "ok";
    return true;
  } catch (const CantRun& reason) {
    row.status = std::string("can't run: ") + reason.what();
    return true;
  } catch (const Failed& reason) {
    row.status = reason.what();
    return false;
  }
}

int measure_all(Gpu& gpu) {
  gpu.sms = attribute(cudaDevAttrMultiProcessorCount);
  gpu.max_shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  gpu.patience = 2000LL * attribute(cudaDevAttrClockRate);
  const std::string device = describe(gpu);
  std::vector<Row> rows = all_rows(gpu.sms, gpu.options.only);
  const Buffer<Verdict> verdict(1);
  gpu.verdict = verdict.get();

  cudaFuncAttributes any;
  const cudaError_t code = cudaFuncGetAttributes(&any, reinterpret_cast<const void*>(&warm_up));
  cudaGetLastError();
  if (code == cudaErrorNoKernelImageForDevice || code == cudaErrorInvalidDeviceFunction) {
    settle(rows, std::string("can't run: this program was built for another GPU (") +
                     cudaGetErrorString(code) + ")");
    print(rows, device);
    return 0;
  }

  launch({.blocks = gpu.sms}, &warm_up, gpu.patience / 4);
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  const auto start = std::chrono::steady_clock::now();
  bool good = true;
  for (Row& row : rows) {
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    if (spent.count() > gpu.options.seconds) {
      settle(rows, "not measured: the time was used up");
      break;
    }
    gpu.hang = [&] {
      row.status = "timed out: the GPU does not come back";
      settle(rows, "not measured: an earlier row hangs the GPU");
      print(rows, device);
      std::_Exit(1);
    };
    good &= measure(gpu, row);
    // An error of a kernel stays; one of a call is over.
    cudaGetLastError();
    if (cudaDeviceSynchronize() != cudaSuccess) {
      settle(rows, "not measured: an earlier row broke the CUDA context");
      good = false;
      break;
    }
  }
  print(rows, device);
  return good ? 0 : 1;
}

Options parse(int count, char** words) {
  Options options;
  for (int index = 1; index < count; index += 2) {
    const std::string name = words[index];
    const char* const value = index + 1 < count ? words[index + 1] : nullptr;
    if (value && name == "--repeats" && std::atoi(value) > 0) {
      options.repeats = std::atoi(value);
    } else if (value && name == "--steps" && std::atoi(value) > 0) {
      options.steps = std::atoi(value);
    } else if (value && name == "--seconds" && std::atof(value) > 0) {
      options.seconds = std::atof(value);
    } else if (value && name == "--only") {
      options.only = value;
    } else {
      std::fprintf(
          stderr,
          "exchanges: expected --repeats N, --steps N, --seconds S (all positive) or --only "
          "PART_OF_A_NAME, got %s %s\n",
          name.c_str(), value ? value : "without a value");
      std::exit(2);
    }
  }
  return options;
}

int main_of(int count, char** words) {
  Gpu gpu;
  gpu.options = parse(count, words);
  int devices = 0;
  const cudaError_t code = cudaGetDeviceCount(&devices);
  if (code != cudaSuccess || devices == 0) {
    std::vector<Row> rows = all_rows(0, gpu.options.only);
    settle(rows, "not measured: no CUDA device");
    print(rows, "null");
    std::fprintf(stderr, "exchanges: no CUDA device: %s\n", cudaGetErrorString(code));
    return 0;
  }
  try {
    return measure_all(gpu);
  } catch (const Failed& reason) {
    std::fprintf(stderr, "exchanges: %s\n", reason.what());
    return 1;
  }
}

}  // namespace
}  // namespace exchanges

int main(int count, char** words) { return exchanges::main_of(count, words); }
