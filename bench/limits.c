/* The two ceilings of the machine, measured: multiply-adds from registers, and reads of an array.
   Compiled by bench/limits.py for the machine at hand; GNU vector types, one register each. */
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float vec __attribute__((vector_size(BYTES), aligned(BYTES)));
enum { kLanes = BYTES / sizeof(float), kChains = 12, kStreams = 8 };

/* Named registers: an array of them would live in memory. 12 chains hide 4-6 cycles on two pipes.
 */
#define CHAINS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define STREAMS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)

static float total(vec v) {
  float sum = 0;
  for (int k = 0; k < kLanes; k++) sum += v[k];
  return sum;
}

/* Floating-point operations of one turn of run_fma. */
long fma_flops(void) { return 2L * kLanes * kChains; }

float run_fma(long turns) {
  vec a, b, sum = {0};
  for (int k = 0; k < kLanes; k++) {
    a[k] = 0.999f;
    b[k] = 0.001f * k;
  }
#define START(j) vec s##j = b + (float)j;
#define TURN(j) s##j = s##j * a + b;
#define ADD(j) sum += s##j;
  CHAINS(START)
  for (long t = 0; t < turns; t++) {
    CHAINS(TURN)
  }
  CHAINS(ADD)
  return total(sum);
}

/* Reads count floats (a multiple of 8 vectors), sweeps times. */
float run_read(const float* data, long count, long sweeps) {
#define ZERO(j) vec r##j = {0};
#define READ(j) r##j += p[j];
#define JOIN(j) sum += r##j;
  vec sum = {0};
  STREAMS(ZERO)
  for (long s = 0; s < sweeps; s++) {
    const vec* end = (const vec*)(data + count);
    for (const vec* p = (const vec*)data; p < end; p += kStreams) {
      STREAMS(READ)
    }
    __asm__ volatile("" ::: "memory"); /* every sweep reads again */
  }
  STREAMS(JOIN)
  return total(sum);
}
