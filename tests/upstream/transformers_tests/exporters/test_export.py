import inspect

import torch


class ExportTesterMixin:
    """A base of `ModelTesterMixin`: whether the model goes through `torch.export`."""

    def test_torch_export(self):
        if not self.test_torch_exportable:
            self.skipTest("test_torch_exportable is False")
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                config, inputs_dict = self.model_tester.prepare_config_and_inputs_for_common()
                inputs = self._prepare_for_class(inputs_dict, model_class)
                if "use_cache" in inspect.signature(model_class.forward).parameters:
                    inputs["use_cache"] = False  # a cache is not a tensor
                model = model_class(config).eval()
                with torch.no_grad():
                    exported = torch.export.export(model, args=(), kwargs=inputs).module()(**inputs)
                    expected = model(**inputs)
                torch.testing.assert_close(exported[0], expected[0], rtol=1e-4, atol=1e-4)
