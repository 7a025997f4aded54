# The stand-ins for upstream modules are called test_*.py, as upstream's are; they hold no tests of their own.
collect_ignore = ["transformers_tests"]

# What transformers' suites mark their tests with.
MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "is_expert_parallel_test",
    "is_fsdp_test",
    "is_pipeline_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "torch_compile_test",
)


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: set by transformers' own suites")
