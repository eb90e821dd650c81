// Products of matrices of floats. Included after kernel_body.h by the file of each instruction set.

// c [R, 16 N] = the rows a[0 .. R - 1] times the columns of b[0 .. N - 1], or added to it. Rows of b are `step` floats apart, those of c
// `ldc`. Every element is one sum over the depth in order, whatever R and N are.
template <int N, int R>
void multiply(const float* const* a, const float* const* b, int64_t step, float* c, int64_t ldc, int64_t depth, bool add) {
  const float *row[R], *tile[N];
  V sum[R][N];
  UNROLL for (int r = 0; r < R; r++) row[r] = a[r];
  UNROLL for (int n = 0; n < N; n++) tile[n] = b[n];
  UNROLL for (int r = 0; r < R; r++) {
    UNROLL for (int n = 0; n < N; n++) sum[r][n] = add ? load(c + r * ldc + n * kTile) : set(0.0f);
  }
  for (int64_t k = 0; k < depth; k++) {
    V y[N];
    UNROLL for (int n = 0; n < N; n++) y[n] = load(tile[n] + k * step);
    UNROLL for (int r = 0; r < R; r++) {
      const V x = set(row[r][k]);
      UNROLL for (int n = 0; n < N; n++) sum[r][n] = fma(x, y[n], sum[r][n]);
    }
  }
  UNROLL for (int r = 0; r < R; r++) {
    UNROLL for (int n = 0; n < N; n++) store(c + r * ldc + n * kTile, sum[r][n]);
  }
}

typedef void (*Multiply)(const float* const*, const float* const*, int64_t, float*, int64_t, int64_t, bool);

template <int N>
Multiply multiply_for(int64_t rows) {
  switch (rows) {
    case 1: return multiply<N, 1>;
    case 2: return multiply<N, 2>;
    case 3: return multiply<N, 3>;
    case 4: return multiply<N, least(4, kRows)>;
    case 5: return multiply<N, least(5, kRows)>;
    default: return multiply<N, least(6, kRows)>;
  }
}

// The same for `rows` <= kRows and `tiles` <= kWide; as many columns together as the registers hold sums for.
inline void multiply_tiles(int64_t rows, int64_t tiles, const float* const* a, const float* const* b, int64_t step, float* c, int64_t ldc,
                           int64_t depth, bool add) {
  const int64_t together = rows == 1 ? kWide : kColumns;  // one row alone needs several sums in flight
  for (int64_t at = 0, n; at < tiles; at += n) {
    n = least(together, tiles - at);
    const Multiply f = rows == 1 ? (n == 1 ? multiply<1, 1> : n == 2 ? multiply<2, 1> : n == 3 ? multiply<3, 1> : multiply<4, 1>)
                       : n == 1  ? multiply_for<1>(rows)
                       : n == 2  ? multiply_for<least(2, kColumns)>(rows)
                       : n == 3  ? multiply_for<least(3, kColumns)>(rows)
                                 : multiply_for<least(4, kColumns)>(rows);
    f(a, b + at, step, c + at * kTile, ldc, depth, add);
  }
}

// The same for b [depth, columns], rows `ldb` apart, and any number of columns, a multiple of 16.
inline void multiply_all(int64_t rows, int64_t columns, const float* const* a, const float* b, int64_t ldb, float* c, int64_t ldc,
                         int64_t depth, bool add) {
  for (int64_t at = 0; at < columns; at += kWide * kTile) {
    const float* tiles[kWide];
    for (int64_t n = 0; n < kWide; n++) tiles[n] = b + at + n * kTile;
    multiply_tiles(rows, least(kWide, (columns - at) / kTile), a, tiles, ldb, c + at, ldc, depth, add);
  }
}
