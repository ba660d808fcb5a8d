"""How exact things are: families of models, trainers and interruptions, metrics."""
