// Runs compiled decoder layers one after another, without returning to Python between them. A layer takes about 0.1 ms
// for few rows; calling it from Python would add half of that.

#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>
#include <torch/custom_class.h>

#include <string>
#include <utility>
#include <vector>

#include "threads.h"

namespace {

// The compiled code that all layers of one kind share, loaded from a library. It is a function from (a layer's tensors,
// hidden state, arguments) to the hidden state.
struct LayerCode : torch::CustomClassHolder {
  explicit LayerCode(const std::string& path) : runner(path) {}
  torch::inductor::AOTIModelContainerRunnerCpu runner;
};

// The tensors (parameters and buffers) of each layer of a model.
struct Layers : torch::CustomClassHolder {
  explicit Layers(std::vector<std::vector<at::Tensor>> layer_tensors) : tensors(std::move(layer_tensors)) {}

  // Runs layers first, first + 1, ..., one for each of `codes`, and returns the hidden state of the last one.
  // arguments: what the stock forward passes to each layer, or one list for all of them. After these, a layer takes
  // `slots`, its own keys and values, and `shared`, which is the same for all layers.
  at::Tensor run(
      int64_t first, const std::vector<c10::intrusive_ptr<LayerCode>>& codes, at::Tensor hidden,
      const std::vector<std::vector<at::Tensor>>& arguments, const at::Tensor& slots,
      const std::vector<at::Tensor>& keys, const std::vector<at::Tensor>& values,
      const std::vector<at::Tensor>& shared) {
    TORCH_CHECK(
        first >= 0 && first + codes.size() <= tensors.size() &&
            (arguments.size() == 1 || arguments.size() == codes.size()) && keys.size() == tensors.size() &&
            values.size() == tensors.size(),
        "layers: ", codes.size(), " codes and ", arguments.size(), " lists of arguments from layer ", first, " of ",
        tensors.size());
    std::vector<at::Tensor> inputs;
    for (size_t i = 0; i < codes.size(); ++i) {
      const size_t layer = first + i;
      const auto& own = arguments[arguments.size() == 1 ? 0 : i];
      inputs = tensors[layer];
      inputs.push_back(std::move(hidden));
      inputs.insert(inputs.end(), own.begin(), own.end());
      inputs.insert(inputs.end(), {slots, keys[layer], values[layer]});
      inputs.insert(inputs.end(), shared.begin(), shared.end());
      const orthrus::LimitedThreads limited;
      hidden = std::move(codes[i]->runner.run(inputs)[0]);
    }
    return hidden;
  }

  std::vector<std::vector<at::Tensor>> tensors;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(orthrus, library) {
  library.class_<LayerCode>("LayerCode").def(torch::init<std::string>());
  library.class_<Layers>("Layers")
      .def(torch::init<std::vector<std::vector<at::Tensor>>>())
      .def("run", &Layers::run);
}
