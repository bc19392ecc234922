"""What Transformers expects of a model: the config of a mixture, and a model that answers as its base does."""
