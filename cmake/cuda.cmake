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
list(FILTER CUDA_HEADERS EXCLUDE REGEX "/(launch|units)\\.h$") # the host's own

# nvcc makes PTX once, for sm_80, and the assembler code of it for each GPU: nothing but Hopper's own units needs more, and
# that takes a third of the time. The PTX goes along for GPUs to come. Code for sm_80 runs on sm_86 and sm_89 as it is.
set(CODE_TO_90 "compute_80")
set(CODE_FROM_100 "")
foreach(arch ${PYFUSE_CUDA_ARCHITECTURES})
  string(REGEX MATCH "^[0-9]+" number ${arch})
  if(NOT (number MATCHES "^8[1-9]$" AND "80" IN_LIST PYFUSE_CUDA_ARCHITECTURES))
    if(number LESS 100)
      list(APPEND CODE_TO_90 "sm_${number}")
    else()
      list(APPEND CODE_FROM_100 "sm_${number}")
    endif()
  endif()
endforeach()
set(CODE ${CODE_TO_90} ${CODE_FROM_100})
foreach(list CODE CODE_TO_90 CODE_FROM_100)
  list(JOIN ${list} "," ${list})
endforeach()

# add_unit(name source [ARCH ...] [AGAIN] [OPTIONS ...]). ARCH: the unit is for this one alone, if the build is for it at
# all. AGAIN: the source says other things for sm_100 and later, so that PTX is made for these as well.
function(add_unit name source)
  cmake_parse_arguments(UNIT "AGAIN" "ARCH" "OPTIONS" ${ARGN})
  set(code -gencode=arch=compute_80,code=[${CODE}])
  set(ptx "80")
  if(UNIT_ARCH)
    if(NOT UNIT_ARCH IN_LIST PYFUSE_CUDA_ARCHITECTURES)
      return()
    endif()
    set(code -gencode=arch=compute_${UNIT_ARCH},code=sm_${UNIT_ARCH})
    set(ptx "${UNIT_ARCH}")
  endif()
  if(UNIT_AGAIN)
    set(ptx "80 100")
    if(CODE_FROM_100)
      set(code -gencode=arch=compute_80,code=[${CODE_TO_90}] -gencode=arch=compute_100,code=[${CODE_FROM_100}])
    endif()
  endif()
  set(fatbin ${CMAKE_CURRENT_BINARY_DIR}/${name}.fatbin)
  set(path ${CMAKE_CURRENT_SOURCE_DIR}/${source})
  add_custom_command(OUTPUT ${fatbin}
    COMMAND ${NVCC} -fatbin -O3 -std=c++17 --compress-mode=size ${code} ${UNIT_OPTIONS} -o ${fatbin} ${path}
    DEPENDS ${path} ${CUDA_HEADERS} COMMENT "nvcc ${name}" VERBATIM)
  list(JOIN UNIT_OPTIONS " " options)
  set(FATBINS ${FATBINS} ${fatbin} PARENT_SCOPE)
  string(APPEND UNIT_DECLARATIONS
    "asm(\".section .rodata\\n.balign 16\\n.globl pyfuse_${name}\\n.hidden pyfuse_${name}\\npyfuse_${name}:\\n.incbin \\\"${fatbin}\\\"\\n.previous\");\n"
    "extern \"C\" const char pyfuse_${name}[] __attribute__((visibility(\"hidden\")));\n")
  string(APPEND UNIT_ROWS "    {\"${name}\", \"${source}\", \"${options}\", \"${ptx}\", pyfuse_${name}},\n")
  set(UNIT_DECLARATIONS "${UNIT_DECLARATIONS}" PARENT_SCOPE)
  set(UNIT_ROWS "${UNIT_ROWS}" PARENT_SCOPE)
endfunction()

foreach(type f32 bf16 f16)
  foreach(d 32 64 96 128 256)
    set(again "")
    if(NOT type STREQUAL f32 AND d EQUAL 128)
      set(again AGAIN)
    endif()
    add_unit(attention_fwd_${type}_d${d} csrc/cuda/attention_fwd.cu ${again} OPTIONS -DELEMENT=${type} -DHEAD_SIZE=${d})
    add_unit(attention_bwd_dkdv_${type}_d${d} csrc/cuda/attention_bwd_dkdv.cu OPTIONS -DELEMENT=${type} -DHEAD_SIZE=${d})
    add_unit(attention_bwd_dq_${type}_d${d} csrc/cuda/attention_bwd_dq.cu OPTIONS -DELEMENT=${type} -DHEAD_SIZE=${d})
    add_unit(attention_bwd_dmask_${type}_d${d} csrc/cuda/attention_bwd_dmask.cu OPTIONS -DELEMENT=${type} -DHEAD_SIZE=${d})
  endforeach()
  add_unit(embed_${type} csrc/cuda/embed.cu OPTIONS -DELEMENT=${type})
  add_unit(embed_bwd_${type} csrc/cuda/embed_bwd.cu OPTIONS -DELEMENT=${type})
  add_unit(row_sums_${type} csrc/cuda/row_sums.cu OPTIONS -DELEMENT=${type})
  add_unit(rope_${type} csrc/cuda/rope.cu OPTIONS -DELEMENT=${type})
endforeach()
foreach(type bf16 f16)
  add_unit(attention_bwd_terms_${type} csrc/cuda/attention_bwd_terms.cu OPTIONS -DELEMENT=${type})
endforeach()

foreach(type f32 bf16 f16)
  foreach(d 32 64 96 128 256)
    set(wide "")
    if(NOT type STREQUAL f32 AND d LESS_EQUAL 128)
      set(wide -DTILES_OF_32)
    endif()
    add_unit(attention_decode_${type}_d${d} csrc/cuda/attention_decode.cu
      OPTIONS -DELEMENT=${type} -DHEAD_SIZE=${d} ${wide})
  endforeach()
  add_unit(attention_merge_${type} csrc/cuda/attention_merge.cu OPTIONS -DELEMENT=${type})
endforeach()

foreach(neighbours 8 4 1)
  add_unit(norm_${neighbours} csrc/cuda/norm.cu OPTIONS -DNEIGHBOURS=${neighbours})
  add_unit(norm_bwd_${neighbours} csrc/cuda/norm_bwd.cu OPTIONS -DNEIGHBOURS=${neighbours})
endforeach()
add_unit(norm_sums csrc/cuda/norm_sums.cu)

foreach(type bf16 f16)
  foreach(d 64 128)
    add_unit(attention_fwd_hopper_${type}_d${d} csrc/cuda/attention_fwd_hopper.cu ARCH 90a
      OPTIONS -DELEMENT=${type} -DHEAD_SIZE=${d})
  endforeach()
endforeach()

configure_file(csrc/cuda/units.cpp.in ${CMAKE_CURRENT_BINARY_DIR}/units.cpp)
set_source_files_properties(${CMAKE_CURRENT_BINARY_DIR}/units.cpp PROPERTIES OBJECT_DEPENDS "${FATBINS}")
pybind11_add_module(_cuda NO_EXTRAS # link-time optimisation would lose what the assembler is told
  csrc/cuda/bindings.cpp
  csrc/cuda/launch.cpp
  csrc/api/cuda_attention.cpp
  csrc/api/cuda_embed.cpp
  csrc/api/cuda_rope.cpp
  csrc/api/cuda_decode.cpp
  csrc/api/cuda_norm.cpp
  csrc/api/cuda_attention_gradient.cpp
  ${CMAKE_CURRENT_BINARY_DIR}/units.cpp)
target_include_directories(_cuda PRIVATE csrc/include csrc)
target_include_directories(_cuda SYSTEM PRIVATE ${CUDA_INCLUDE})
target_compile_options(_cuda PRIVATE -Wall -Wextra)
find_package(Threads REQUIRED)
target_link_libraries(_cuda PRIVATE ${CUDART_STATIC} Threads::Threads ${CMAKE_DL_LIBS} rt)
