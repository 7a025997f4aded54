"""A value that is not the default for every field that all configurations share; `ConfigTester` passes them all."""

config_common_kwargs = {
    "architectures": ["AnyModel"],
    "output_hidden_states": True,
    "return_dict": False,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "is_encoder_decoder": True,
    "id2label": {0: "label"},
    "label2id": {"label": 0},
    "problem_type": "regression",
}
