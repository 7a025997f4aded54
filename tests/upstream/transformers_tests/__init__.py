"""
The common test suites of the installed version of transformers, importable under a name of their own:

    from transformers_tests.test_modeling_common import ModelTesterMixin

The suites ship in the source distribution of transformers only, as a package called `tests`. Importing this package
downloads that distribution once (see `fetch.py`) and adds its folder to this package, where upstream's relative
imports keep working and nothing collides with this repository's own `tests`.

The distribution leaves out some modules that its suites import. What stands beside this file takes their place:

| module | what it is here |
|---|---|
| `distributed_testing_utils` | `run_distributed`, written anew |
| `utils.test_configuration_utils` | the values `ConfigTester` passes to a configuration, written anew |
| `generation.test_utils` | an empty `GenerationTesterMixin`; generation is tested in this repository's own tests |
| `fetch_hub_objects_for_ci` (in the folder above) | media of our own making instead of the Hub's |
| `exporters.test_export` | `ExportTesterMixin`, written anew with one test |

How to run a suite on a class of ours: `test_modeling_languagebind_upstream.py` is the shortest example. A model with
a head needs three more things, before its module is imported the first time:

- Suites decide by class *name* what a model can do. Enter the names as a native model would be: in
  `MODEL_MAPPING_NAMES[model_type]` the base model, in `MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]` and
  `MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[model_type]` the model that generates.
- The test class inherits `GenerationTesterMixin` when the model generates; `ModelTesterMixin` demands it.
- The tensor-parallel suite skips model types that are not in
  `test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES`; add ours.

Skip a test by overriding it with `@unittest.skip("why")`: every skip of ours carries its reason in the code.
"""

from .fetch import fetch_suites


__path__.append(str(fetch_suites()))
