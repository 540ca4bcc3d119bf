// Compiled decoder layers, run one after another without a way back to Python between them: a layer of few rows
// takes a tenth of a millisecond, and calling it from Python as much as half of that again.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/custom_class.h>

#include <string>
#include <utility>
#include <vector>

namespace {

// The code of all layers of a kind: (a layer's tensors, hidden state, arguments) -> hidden state.
struct LayerCode : torch::CustomClassHolder {
  explicit LayerCode(const std::string& path) : loader(path) {}
  torch::inductor::AOTIModelPackageLoader loader;
};

// The layers of a model by the tensors that are theirs.
struct Layers : torch::CustomClassHolder {
  explicit Layers(std::vector<std::vector<at::Tensor>> given) : tensors(std::move(given)) {}

  // Layers first, first + 1, ... by one code and one list of arguments each; returns the last one's hidden state.
  at::Tensor run(
      int64_t first, const std::vector<c10::intrusive_ptr<LayerCode>>& codes, at::Tensor hidden,
      const std::vector<std::vector<at::Tensor>>& arguments) {
    TORCH_CHECK(
        first >= 0 && first + codes.size() <= tensors.size() && codes.size() == arguments.size(),
        "layers: ", codes.size(), " codes and ", arguments.size(), " lists of arguments from layer ", first, " of ",
        tensors.size());
    std::vector<at::Tensor> inputs;
    for (size_t i = 0; i < codes.size(); ++i) {
      inputs = tensors[first + i];
      inputs.push_back(std::move(hidden));
      inputs.insert(inputs.end(), arguments[i].begin(), arguments[i].end());
      hidden = std::move(codes[i]->loader.run(inputs)[0]);
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
