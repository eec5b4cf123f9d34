"""What headers are made of, the likeliest last: the dictionary that deflates them.

It belongs to the version of the file format and does not change within one.
"""

WORDS = (
    b'"Grouped","scale_bits":,"group":128,"Lookup","LowRank","constants":{"edits":[{"kind":"take'
    b'","path":"arguments":{"dim":0,"keep":[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20'
    b']}},{"kind":"plain"{"kind":"replace","arguments":{"type":"Sequential","children":[{"type":'
    b'"Identity"}{"type":"Linear","in":512,"out":10,"bias":true}{"type":"Conv2d","in":16,"out":1'
    b'6,"kernel_size":[3,3],"stride":[1,1],"padding":[1,1],"dilation":[1,1],"groups":1,"bias":fa'
    b'lse,"padding_mode":"zeros"}"grids":{"input:0":{"scale":0.0,"zero_point":0,"low":0,"high":2'
    b'55},"low_rank","embedding.default","layer_norm.default","scaled_dot_product_attention.defa'
    b'ult","gelu.default","softmax.int","transpose.int","permute.default","slice.Tensor","mul.Te'
    b'nsor","cat.default","mean.dim",[-1,-2],true]],["silu.default","hardtanh.default","sigmoid.'
    b'default","tanh.default","lstm.input","gru.input","getitem","avg_pool2d.default","adaptive_'
    b'avg_pool2d.default",[{"node":1},[1,1]]],["view.default",[{"node":1},[-1,512]]],["pad.defau'
    b'lt","weight""layer1.0.conv1.weight//codes","uint8",[16,16,3,3],8,"entropy","layer1.0.bn1.r'
    b'unning_mean","float32",[16],32],["layer1.0.bn1.running_var","layer1.0.bn1.num_batches_trac'
    b'ked","int64",[],64],["layer2.0.bn2.bias","float32",[32],32],["conv1.weight//scale","float3'
    b'2",[16],32],["fc.weight//table","float32",[1,16,1],32],["fc.bias","float32",[10],32],["wei'
    b'ght//zero_point",["features.0.weight//mask","uint8",[64,3,3,3],1,"entropy","features.0.wei'
    b'ght//value","float32","raw"]],"rest":["raw",["0.weight//codes","uint8",[],3,"entropy","0.b'
    b'ias//codes","uint8",[],8],["0.weight//scale","float32",[],32],["0.bias","float32",[20],32]'
    b'],"rest":["entropy","structure":{"edits":[],"grids":{},"constants":{},"forms":{"layer1.0.c'
    b'onv1.weight":{"spec":{"form":"Affine","bits":8,"symmetric":true,"axis":0,"inner":{"form":"'
    b'Dense"}},"shape":[16,16,3,3]},"fc.weight":{"spec":{"form":"Sparse","inner":{"form":"Lookup'
    b'","size":16,"inner":{"form":"Dense"}}},"shape":[10,512]},"0.weight":{"spec":{"form":"Spars'
    b'e","inner":{"form":"Dense"}},"shape":[50,20,5,5]},"0.bias":{"spec":{"form":"Affine","bits"'
    b':4,"symmetric":true,"axis":null,"inner":{"form":"Dense"}},"shape":[500]}}},"graph":{"nodes'
    b'":[["input"],["weight","conv1.weight"],["tensor","bn1.running_mean"],["tensor","bn1.runnin'
    b'g_var"],["batch_norm.default",[{"node":5},{"node":4},{"node":3},{"node":2},{"node":1},fals'
    b'e,0.1,1e-05,true]],["add.Tensor",[{"node":1},{"node":9}]],["conv2d.default",[{"node":2},{"'
    b'node":1},null,[1,1],[1,1],[1,1],1]],["max_pool2d.default",[{"node":1},[2,2],[2,2]]],["relu'
    b'.default",[{"node":1}]],["flatten.using_ints",[{"node":1},1]],["weight","0.weight"],["weig'
    b'ht","0.bias"],["conv2d.default",[{"node":3},{"node":2},{"node":1}]],["relu.default",[{"nod'
    b'e":1}]],["linear.default",[{"node":3},{"node":2},{"node":1}]]],"outputs":[{"node":1}],"tem'
    b'plate":{"leaf":0}},"tensors":[["0.weight"'
)
