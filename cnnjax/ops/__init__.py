"""Operations of the networks: convolution and pooling, and the binding to oneDNN."""
