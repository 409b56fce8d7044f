"""X-ARES's own facts of its 28 tasks and its published scores, for tests to hold the task files against."""

# X-ARES 0.1.3's clip tasks of one label. Name, domain, Zenodo record, weight, seconds of a crop, json key, classes and the
# start of the SHA-256 of their names joined by line ends, epochs, batch, kNN, shards: of train, valid and test, or of folds.
FACTS = """
asvspoof2015           speech       14718430  2000  -   binary_spoof           2     81a50ba0  5   64  knn  asvspoof_train asvspoof_valid asvspoof_eval
cremad                 speech       14646870  1116  -   label                  6     2fee0139  10  32  knn  wds-audio-train wds-audio-valid wds-audio-test
esc50                  environment  14614287  400   -   label                  50    -         10  32  knn  1-5 wds-audio-fold-{}-*.tar
finger_snap            environment  private   5000  -   tag                    2     c25c7af7  20  32  knn  finger_snap_train finger_snap_test finger_snap_test
fluentspeechcommands   speech       14722453  2000  -   transcription          248   e3711d0f  10  32  knn  fluentspeechcommands_train fluentspeechcommands_valid fluentspeechcommands_test
freemusicarchive       music        14725056  800   10  genre                  8     0f71892a  3   32  knn  fma_small_train fma_small_valid fma_small_test
fsdkaggle2018          environment  14725117  1600  -   sound                  41    330f2599  3   64  -    fsd18_train fsd18_test fsd18_test
gtzan_genre            music        14722472  100   -   genre                  10    91c7460c  10  32  knn  0-9 gtzan_fold_{}_0000000.tar
inside_outside_car     environment  private   5000  -   position               2     9d27d540  20  32  knn  inside_outside_car_train inside_outside_car_test inside_outside_car_test
key_scratching         environment  private   5000  -   tag                    2     c25c7af7  20  32  knn  key_scratching_train key_scratching_test key_scratching_test
libricount             speech       14722478  1144  -   num_speakers           11    -         10  64  knn  0-4 libricount_fold0{}.tar
librispeechmalefemale  speech       14716252  2620  5   gender                 2     4f9c6c3d  10  32  knn  train-clean-100 dev-clean test-clean
liveenv                environment  private   5000  -   soundevent             28    8cb7124f  50  32  -    liveenv_train liveenv_test liveenv_test
nsynthinstument        music        14725174  2000  -   instrument_family_str  11    ca4ee8cb  10  32  knn  nsynth_train nsynth_valid nsynth_test
ravdess                speech       14722524  360   -   emotion                8     7a5327f6  10  32  knn  0-3 ravdess_fold_{}_0000000.tar
speechcommandsv1       speech       14722647  2000  -   labels                 30    97e728c1  10  64  knn  wds-audio-train wds-audio-valid wds-audio-test
subway_broadcast       environment  private   5000  -   broadcasting           2     -         20  32  knn  subway_broadcast subway_broadcast subway_broadcast
urbansound8k           environment  14722683  873   -   soundevent             10    5b3825eb  10  32  knn  1-10 urbansound_fold{}_0000000.tar
vocalimitations        environment  14862060  1867  -   imitation              302   fc0897c3  20  32  knn  0-2 vocal_imitations_fold0{}_0000000.tar
vocalsound             speech       14722710  2000  -   label                  6     3edebcc6  10  32  knn  train valid test
voxceleb1              speech       14811963  2000  6   speakerid              1251  946d4561  10  32  knn  voxceleb1_train voxceleb1_valid voxceleb1_test
voxlingua33            speech       14812245  1609  10  labels                 33    c1faed21  10  64  knn  train_subset dev dev
"""  # noqa: E501

# Its tasks of other kinds. Name, domain, Zenodo record, weight, seconds of a crop, kind, classes and the start of the
# SHA-256 of their names joined by line ends, epochs, batch, our head, our name of the metric, shards.
OTHERS = """
clotho         environment  14856454  1045   30  captions    0 -           20  128  retrieval  recall_at_1             clotho_development clotho_evaluation clotho_validation
desed          environment  14808180  1153   -   events      10 cf0f6c10   10  32   linear     segment_f1_macro        wds-audio-train wds-audio-eval wds-audio-eval
fsd50k         environment  14868441  2000   10  tags        200 896fa704  10  64   linear     mean_average_precision  fsd50k_train fsd50k_validation fsd50k_eval
librispeech    speech       14716252  10000  -   transcript  0 -           10  4    ctc        one_minus_wer           train-clean-100 dev-clean test-clean
maestro        music        14858022  65     -   events      87 1764b736   50  1    linear     segment_f1_micro        maestro_train maestro_valid maestro_test
speechocean762 speech       14725291  -      -   number      0 -           25  32   linear     mse                     speechocean762_train speechocean762_test speechocean762_test
"""  # noqa: E501

# Its README's scores of dasheng, wav2vec2, whisper and data2vec: of the linear head, then of kNN.
PUBLISHED = """
asvspoof2015           .964 .924 .966 .937   .869 .858 .843 .942
cremad                 .767 .541 .572 .523   .380 .221 .372 .351
esc50                  .857 .510 .528 .229   .618 .081 .191 .040
finger_snap            .870 .872 .861 .808   .848 .787 .401 .461
fluentspeechcommands   .946 .468 .776 .978   .260 .017 .032 .630
freemusicarchive       .643 .469 .581 .334   .592 .251 .406 .106
fsdkaggle2018          .534 .241 .241 .153
gtzan_genre            .851 .630 .622 .448   .758 .303 .350 .108
inside_outside_car     .972 .928 .866 .869   .798 .575 .730 .588
key_scratching         .999 .983 .985 .909   .955 .923 .691 .550
libricount             .681 .583 .549 .492   .311 .235 .246 .176
librispeechmalefemale  .986 .948 .973 .752   .791 .606 .617 .724
liveenv                .986 .955 .887 .759
nsynthinstument        .688 .443 .532 .336   .499 .251 .205 .179
ravdess                .749 .442 .459 .467   .408 .169 .296 .313
speechcommandsv1       .969 .714 .933 .927   .903 .208 .096 .852
subway_broadcast       .972 .930 .942 .869   .949 .533 .884 .530
urbansound8k           .833 .659 .687 .426   .662 .339 .215 .156
vocalimitations        .253 .147 .180 .128   .107 .010 .016 .018
vocalsound             .910 .768 .860 .803   .382 .269 .405 .308
voxceleb1              .780 .340 .388 .105   .262 .003 .010 .033
voxlingua33            .814 .553 .873 .620   .376 .034 .360 .058
clotho                 .029 .014 .038 .008
desed                  .537 .313 .127 .136
fsd50k                 .409 .166 .262 .085
librispeech            .608 .405 .721 .893
maestro                .524 .180 .011 .116
"""
ENCODERS = ("dasheng", "wav2vec2", "whisper", "data2vec")

facts = [row.split(None, 11) for row in FACTS.strip().splitlines()]
others = [row.split(None, 12) for row in OTHERS.strip().splitlines()]
scores = [row.split() for row in PUBLISHED.strip().splitlines()]
