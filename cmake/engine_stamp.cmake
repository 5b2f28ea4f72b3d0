# Writes OUT, a header with a hash of what a cell is compiled with at run time (rnnfast.load_cell): such a cell fits the
# library that was made of the same headers. rnnfast/_own_library.py computes the same hash.
file(GLOB files RELATIVE "${SOURCE}" "${SOURCE}/cells/*.h" "${SOURCE}/core/*.h" "${SOURCE}/cpu/*.h" "${SOURCE}/cpu/own_cell.cpp"
     "${SOURCE}/cuda/*.h" "${SOURCE}/cuda/*.cuh" "${SOURCE}/cuda/ops/*.cuh" "${SOURCE}/cuda/own_cell.cu")
list(SORT files)
foreach(file IN LISTS files)
  file(SHA256 "${SOURCE}/${file}" hash)
  string(APPEND text "${file} ${hash}\n")
endforeach()
string(SHA256 stamp "${text}")
string(SUBSTRING "${stamp}" 0 16 stamp)
file(WRITE "${OUT}" "#define RNNFAST_ENGINE_STAMP \"${stamp}\"\n")
