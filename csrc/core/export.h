// Visibility of the few symbols that other libraries of the package use.
#pragma once

#define FASTLM_API __attribute__((visibility("default")))
