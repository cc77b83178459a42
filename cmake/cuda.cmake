# pyfuse._cuda: each unit below is one source compiled with its own options to a fatbin, code for every architecture of
# PYFUSE_CUDA_ARCHITECTURES, which the module carries and loads by name (csrc/cuda/launch.cpp).
set(PYFUSE_CUDA auto CACHE STRING "build pyfuse._cuda: on, off, or auto: where nvcc is found")
set(PYFUSE_CUDA_ARCHITECTURES "80;86;89;90a;100;120" CACHE STRING "what its kernels are compiled for")

if(PYFUSE_CUDA STREQUAL "off")
  return()
endif()
find_program(NVCC nvcc HINTS "$ENV{CUDACXX}" "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" /usr/local/cuda/bin)
if(NOT NVCC)
  if(PYFUSE_CUDA STREQUAL "on")
    message(FATAL_ERROR "PYFUSE_CUDA=on, but nvcc is neither in PATH nor in CUDA_HOME/bin")
  endif()
  message(STATUS "nvcc was not found: pyfuse._cuda is not built")
  return()
endif()
get_filename_component(CUDA_ROOT "${NVCC}" REALPATH)
get_filename_component(CUDA_ROOT "${CUDA_ROOT}/../.." REALPATH)
find_path(CUDA_INCLUDE cuda_runtime_api.h HINTS "${CUDA_ROOT}/include" "${CUDA_ROOT}/targets/x86_64-linux/include" REQUIRED)
find_library(CUDART_STATIC cudart_static HINTS "${CUDA_ROOT}/lib64" "${CUDA_ROOT}/lib" "${CUDA_ROOT}/targets/x86_64-linux/lib" REQUIRED)

set(FATBINS "")
set(UNIT_DECLARATIONS "")
set(UNIT_ROWS "")
file(GLOB CUDA_HEADERS CONFIGURE_DEPENDS csrc/cuda/*.cuh csrc/cuda/*.h)

# add_unit(name source [ARCHS ...] [OPTIONS ...]): of the build's architectures only those named here, if any are.
function(add_unit name source)
  cmake_parse_arguments(UNIT "" "" "ARCHS;OPTIONS" ${ARGN})
  set(archs ${PYFUSE_CUDA_ARCHITECTURES})
  if(UNIT_ARCHS)
    set(archs "")
    foreach(arch ${UNIT_ARCHS})
      if(arch IN_LIST PYFUSE_CUDA_ARCHITECTURES)
        list(APPEND archs ${arch})
      endif()
    endforeach()
  endif()
  if(NOT archs)
    return()
  endif()
  set(code "")
  foreach(arch ${archs})
    list(APPEND code -gencode arch=compute_${arch},code=sm_${arch})
  endforeach()
  if(NOT UNIT_ARCHS) # for GPUs to come
    list(GET archs -1 last)
    list(APPEND code -gencode arch=compute_${last},code=compute_${last})
  endif()
  set(fatbin ${CMAKE_CURRENT_BINARY_DIR}/${name}.fatbin)
  set(path ${CMAKE_CURRENT_SOURCE_DIR}/${source})
  add_custom_command(OUTPUT ${fatbin}
    COMMAND ${NVCC} -fatbin -O3 -std=c++17 ${code} ${UNIT_OPTIONS} -o ${fatbin} ${path}
    DEPENDS ${path} ${CUDA_HEADERS} COMMENT "nvcc ${name}" VERBATIM)
  list(JOIN UNIT_OPTIONS " " options)
  list(JOIN archs " " archs)
  set(FATBINS ${FATBINS} ${fatbin} PARENT_SCOPE)
  string(APPEND UNIT_DECLARATIONS
    "asm(\".section .rodata\\n.balign 16\\n.globl pyfuse_${name}\\n.hidden pyfuse_${name}\\npyfuse_${name}:\\n.incbin \\\"${fatbin}\\\"\\n.previous\");\n"
    "extern \"C\" const char pyfuse_${name}[] __attribute__((visibility(\"hidden\")));\n")
  string(APPEND UNIT_ROWS "    {\"${name}\", \"${source}\", \"${options}\", \"${archs}\", pyfuse_${name}},\n")
  set(UNIT_DECLARATIONS "${UNIT_DECLARATIONS}" PARENT_SCOPE)
  set(UNIT_ROWS "${UNIT_ROWS}" PARENT_SCOPE)
endfunction()

foreach(type f32 bf16 f16)
  foreach(d 32 64 96 128 256)
    add_unit(attention_fwd_${type}_d${d} csrc/cuda/attention_fwd.cu OPTIONS -DELEMENT=${type} -DHEAD_SIZE=${d})
  endforeach()
endforeach()

foreach(type bf16 f16)
  foreach(d 64 128)
    add_unit(attention_fwd_hopper_${type}_d${d} csrc/cuda/attention_fwd_hopper.cu ARCHS 90a
      OPTIONS -DELEMENT=${type} -DHEAD_SIZE=${d})
  endforeach()
endforeach()

configure_file(csrc/cuda/units.cpp.in ${CMAKE_CURRENT_BINARY_DIR}/units.cpp)
set_source_files_properties(${CMAKE_CURRENT_BINARY_DIR}/units.cpp PROPERTIES OBJECT_DEPENDS "${FATBINS}")
pybind11_add_module(_cuda NO_EXTRAS # link-time optimisation would lose what the assembler is told
  csrc/cuda/bindings.cpp
  csrc/cuda/launch.cpp
  csrc/api/cuda_attention.cpp
  ${CMAKE_CURRENT_BINARY_DIR}/units.cpp)
target_include_directories(_cuda PRIVATE csrc/include csrc)
target_include_directories(_cuda SYSTEM PRIVATE ${CUDA_INCLUDE})
target_compile_options(_cuda PRIVATE -Wall -Wextra)
find_package(Threads REQUIRED)
target_link_libraries(_cuda PRIVATE ${CUDART_STATIC} Threads::Threads ${CMAKE_DL_LIBS} rt)
