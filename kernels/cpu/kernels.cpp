namespace fastconv {}
