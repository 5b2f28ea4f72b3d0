# Decides on CUDA and says so in one line. There are no CUDA engines yet: what is compiled proves that the cells, which are
# written once for CPU and GPU, are good device code, and nothing of it is installed.
set(RNNFAST_CUDA_ON OFF)
if(RNNFAST_CUDA STREQUAL "0")
  message(STATUS "rnnfast: CUDA off (RNNFAST_CUDA=0)")
else()
  find_program(RNNFAST_NVCC nvcc HINTS "$ENV{CUDA_HOME}/bin" /usr/local/cuda/bin)
  if(NOT RNNFAST_NVCC)
    if(RNNFAST_CUDA STREQUAL "1")
      message(FATAL_ERROR "rnnfast: RNNFAST_CUDA=1, but no nvcc was found on PATH or in $CUDA_HOME/bin.")
    endif()
    message(STATUS "rnnfast: CUDA off (RNNFAST_CUDA=auto, and no nvcc on PATH or in $CUDA_HOME/bin)")
  else()
    set(RNNFAST_CUDA_ON ON)
  endif()
endif()

if(RNNFAST_CUDA_ON)
  # nvcc itself knows its toolkit; the file on PATH may be a wrapper that lies elsewhere.
  execute_process(COMMAND ${RNNFAST_NVCC} --version OUTPUT_VARIABLE nvcc_text)
  string(REGEX MATCH "release ([0-9.]+)" nvcc_release "${nvcc_text}")
  set(nvcc_release "${CMAKE_MATCH_1}")  # kept here: the next expression sets CMAKE_MATCH_1 anew
  list(TRANSFORM RNNFAST_CUDA_ARCHS REPLACE "(.+)" "-gencode=arch=compute_\\1,code=sm_\\1" OUTPUT_VARIABLE gencodes)
  add_custom_command(
    OUTPUT ${CMAKE_BINARY_DIR}/cells_on_device.o
    COMMAND ${RNNFAST_NVCC} -std=c++20 -O3 -Xcompiler -fPIC ${gencodes} -Werror all-warnings -c
            ${CMAKE_SOURCE_DIR}/csrc/cuda/cells_on_device.cu -o ${CMAKE_BINARY_DIR}/cells_on_device.o
    DEPENDS csrc/cuda/cells_on_device.cu csrc/cells/list.h csrc/cells/cell.h csrc/cells/lstm.h csrc/cells/gru.h csrc/cells/rnn.h
            csrc/cells/indrnn.h csrc/core/math.h csrc/core/target.h
    COMMENT "Compiling the cells for the device (sm_${RNNFAST_CUDA_ARCHS})"
    VERBATIM)
  add_custom_target(rnnfast_cuda ALL DEPENDS ${CMAKE_BINARY_DIR}/cells_on_device.o)
  message(STATUS "rnnfast: CUDA on (RNNFAST_CUDA=${RNNFAST_CUDA}, nvcc ${nvcc_release}, sm_${RNNFAST_CUDA_ARCHS}): "
                 "the cells are compiled for the device; this version has no CUDA engine, so no _C_cuda is installed")
endif()
