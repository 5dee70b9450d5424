# fastlm_settings: what every target of ours is compiled with. Flags hang on targets; nothing is set globally.
add_library(fastlm_settings INTERFACE)
target_compile_features(fastlm_settings INTERFACE cxx_std_20)
target_include_directories(fastlm_settings INTERFACE "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
target_compile_options(fastlm_settings INTERFACE
  "$<$<COMPILE_LANGUAGE:CXX>:-fPIC;-fvisibility=hidden;-Wall;-Wextra;-Wno-psabi>"
  "$<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU>>:-fno-gnu-unique>"
  "$<$<AND:$<BOOL:${FASTLM_WERROR}>,$<COMPILE_LANGUAGE:CXX>>:-Werror>")
if(FASTLM_SANITIZE)
  # -O1 comes after every other -O: instrumented code takes several times longer to compile at -O3 and finds no more.
  string(REPLACE ";" "," _sanitizers "${FASTLM_SANITIZE}")
  target_compile_options(fastlm_settings INTERFACE
    "$<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${_sanitizers};-fno-omit-frame-pointer;-fno-sanitize-recover=all;-O1;-g1>")
  target_link_options(fastlm_settings INTERFACE "-fsanitize=${_sanitizers}")
endif()
