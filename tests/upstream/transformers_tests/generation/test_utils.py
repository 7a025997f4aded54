class GenerationTesterMixin:
    """Inherited by the suites of models that generate, because `ModelTesterMixin` asks for it. Tests nothing."""
