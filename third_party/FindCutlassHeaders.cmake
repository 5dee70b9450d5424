# Finds the CUTLASS headers: FASTLM_CUTLASS_DIR, else the PyPI package nvidia-cutlass (its headers lie in
# cutlass_library/source/include; install it with --no-deps, it is needed at build time only). As torch, the package is looked for
# in the user's environment first, which an isolated build hides behind PYTHONPATH.
#
# Sets: CutlassHeaders_FOUND, CutlassHeaders_INCLUDE_DIR, CutlassHeaders_VERSION, CutlassHeaders_WHY_NOT

set(CutlassHeaders_WHY_NOT "")
if(FASTLM_CUTLASS_DIR)
  set(_cutlass_candidates "${FASTLM_CUTLASS_DIR}" "${FASTLM_CUTLASS_DIR}/include")
else()
  set(_cutlass_candidates "")
  foreach(_path "--unset=PYTHONPATH" "PYTHONPATH=$ENV{PYTHONPATH}")
    execute_process(
      COMMAND ${CMAKE_COMMAND} -E env --unset=PYTHONNOUSERSITE "${_path}" "${Python_EXECUTABLE}" -c
        "import importlib.util as u, pathlib; s = u.find_spec('cutlass_library'); print(pathlib.Path(s.origin).parent / 'source' / 'include' if s and s.origin else '')"
      OUTPUT_VARIABLE _cutlass_found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    list(APPEND _cutlass_candidates ${_cutlass_found})
  endforeach()
endif()
set(CutlassHeaders_INCLUDE_DIR "")
foreach(_dir IN LISTS _cutlass_candidates)
  if(EXISTS "${_dir}/cutlass/cutlass.h")
    set(CutlassHeaders_INCLUDE_DIR "${_dir}")
    break()
  endif()
endforeach()

if(CutlassHeaders_INCLUDE_DIR)
  set(CutlassHeaders_FOUND TRUE)
  file(STRINGS "${CutlassHeaders_INCLUDE_DIR}/cutlass/version.h" _cutlass_lines REGEX "#define CUTLASS_(MAJOR|MINOR|PATCH)")
  set(_cutlass_numbers "")
  foreach(_line IN LISTS _cutlass_lines)
    string(REGEX REPLACE ".*CUTLASS_[A-Z]+ +([0-9]+).*" "\\1" _number "${_line}")
    list(APPEND _cutlass_numbers "${_number}")
  endforeach()
  list(JOIN _cutlass_numbers "." CutlassHeaders_VERSION)
  message(STATUS "fastlm: CUTLASS ${CutlassHeaders_VERSION} headers in ${CutlassHeaders_INCLUDE_DIR}")
else()
  set(CutlassHeaders_FOUND FALSE)
  if(FASTLM_CUTLASS_DIR)
    set(CutlassHeaders_WHY_NOT "no cutlass/cutlass.h in FASTLM_CUTLASS_DIR=${FASTLM_CUTLASS_DIR}")
  else()
    set(CutlassHeaders_WHY_NOT "the package nvidia-cutlass is not installed (pip install --no-deps nvidia-cutlass)")
  endif()
endif()
