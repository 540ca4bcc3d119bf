// Compiled decoder layers, run one after another without a way back to Python between them: a layer of few rows
// takes a tenth of a millisecond, and calling it from Python as much as half of that again.

#include <torch/csrc/inductor/aoti_runner/model_container_runner_cpu.h>
#include <torch/custom_class.h>

#include <string>
#include <utility>
#include <vector>

#include "threads.h"

namespace {

// The code of all layers of a kind, a library: (a layer's tensors, hidden state, arguments) -> hidden state.
struct LayerCode : torch::CustomClassHolder {
  explicit LayerCode(const std::string& path) : runner(path) {}
  torch::inductor::AOTIModelContainerRunnerCpu runner;
};

// The layers of a model by the tensors that are theirs.
struct Layers : torch::CustomClassHolder {
  explicit Layers(std::vector<std::vector<at::Tensor>> given) : tensors(std::move(given)) {}

  // Layers first, first + 1, ... by one code each; returns the last one's hidden state. given: what the stock
  // forward gives to each, or to all alike; after it come slots, the layer's keys and values, and `rest`.
  at::Tensor run(
      int64_t first, const std::vector<c10::intrusive_ptr<LayerCode>>& codes, at::Tensor hidden,
      const std::vector<std::vector<at::Tensor>>& given, const at::Tensor& slots, const std::vector<at::Tensor>& keys,
      const std::vector<at::Tensor>& values, const std::vector<at::Tensor>& rest) {
    TORCH_CHECK(
        first >= 0 && first + codes.size() <= tensors.size() && (given.size() == 1 || given.size() == codes.size()) &&
            keys.size() == tensors.size() && values.size() == tensors.size(),
        "layers: ", codes.size(), " codes and ", given.size(), " lists of arguments from layer ", first, " of ",
        tensors.size());
    std::vector<at::Tensor> inputs;
    for (size_t i = 0; i < codes.size(); ++i) {
      const size_t layer = first + i;
      const auto& own = given[given.size() == 1 ? 0 : i];
      inputs = tensors[layer];
      inputs.push_back(std::move(hidden));
      inputs.insert(inputs.end(), own.begin(), own.end());
      inputs.insert(inputs.end(), {slots, keys[layer], values[layer]});
      inputs.insert(inputs.end(), rest.begin(), rest.end());
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
