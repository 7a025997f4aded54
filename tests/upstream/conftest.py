# The stand-ins for upstream modules are called test_*.py, as upstream's are; they hold no tests of their own.
collect_ignore = ["transformers_tests"]
